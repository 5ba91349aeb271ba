"""Composing and checking configs: right values become typed, a wrong one is one line that says how to mend it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Literal

import pytest
from omegaconf import OmegaConf
from pydantic import Field

from seqtrain import config as config_module
from seqtrain.config import compose_config, show_text, validate
from seqtrain.errors import ConfigError


@dataclass(frozen=True)
class Train:
    steps: Annotated[int, Field(gt=0)]
    dtype: Literal["float32", "bfloat16"]
    rate: float = 0.1


@dataclass(frozen=True)
class Program:
    train: Train
    layers: tuple[str, ...] = ()


GOOD = {"train": {"steps": 3, "dtype": "float32"}, "layers": ["gla"]}


def test_good_values_become_dataclasses():
    program = validate(Program, GOOD | {"train": {"steps": 3, "dtype": "float32", "rate": 1}})
    assert program == Program(Train(3, "float32", 1.0), ("gla",))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": "many"}, "train.steps=many: must be a valid integer"),
        ({"steps": 1.5}, "train.steps=1.5: must be a valid integer"),
        ({"steps": True}, "train.steps=true: must be a valid integer"),
        ({"steps": 0}, "train.steps=0: must be greater than 0"),
        ({"dtype": "bfloat"}, "train.dtype=bfloat: must be 'float32' or 'bfloat16'; did you mean 'bfloat16'?"),
        ({"stepz": 1}, "config key 'train.stepz' is unknown; did you mean 'train.steps'? Known: "),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_rule(train, message):
    with pytest.raises(ConfigError) as caught:
        validate(Program, {"train": GOOD["train"] | train})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match=r"^train\.dtype: is required$"):
        validate(Program, {"train": {"steps": 1}})


@pytest.fixture
def conf(tmp_path, monkeypatch):
    files = {
        "main.yaml": """
            defaults:
              - optimizer: adamw
              - mixer: all
              - _self_
              - override hydra/job_logging: none
              - override hydra/hydra_logging: none
            output_dir: out
            train: {steps: 10, dtype: float32}
            hydra:
              output_subdir: null
              run: {dir: "."}
              sweep: {dir: "${output_dir}", subdir: "${hydra.job.num}"}
            """,
        "optimizer/adamw.yaml": "lr: 0.1",
        "mixer/gla.yaml": "expand: 2",
        "mixer/s5.yaml": "state: 16",
    }
    for name, text in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    monkeypatch.setattr(config_module, "conf_dir", lambda: tmp_path / "conf")
    return tmp_path / "conf"


def test_every_file_of_the_mixer_group_is_composed(conf):
    composed = compose_config("main", ["mixer.s5.state=32"])
    assert OmegaConf.to_container(composed.mixer) == {"gla": {"expand": 2}, "s5": {"state": 32}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.stepz=1",
            "config key 'train.stepz' is unknown; did you mean 'train.steps'? Known: train.dtype, train.steps",
        ),
        ("trian.steps=1", "config key 'trian' is unknown; did you mean 'train'? Known: "),
        ("optimzer=adamw", "config key 'optimzer' is unknown; did you mean 'optimizer'? Known: "),
        ("optimizer=adamv", "optimizer= 'adamv' is unknown; did you mean 'adamw'? Known: adamw"),
        (
            "mixer.s5.stat=1",
            "config key 'mixer.s5.stat' is unknown; did you mean 'mixer.s5.state'? Known: mixer.s5.state",
        ),
        ("train.steps=[1", "train.steps=[1: "),
        ("train.steps=${nothing}", "train.steps=${nothing}: "),
    ],
)
def test_a_wrong_override_is_one_line(conf, override, message):
    with pytest.raises(ConfigError) as caught:
        compose_config("main", [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


PROGRAM = """
import pathlib, sys
from dataclasses import dataclass
from omegaconf import OmegaConf
from seqtrain import config as module
module.conf_dir = lambda: pathlib.Path({conf!r})

@dataclass(frozen=True)
class Train:
    steps: int
    dtype: str

def read(config):
    return module.validate(Train, OmegaConf.to_container(config.train), prefix="train."), config.output_dir

def run(program):
    train, output_dir = program
    if train.steps == 40:
        raise module.ConfigError("train.steps=40: found out late")
    pathlib.Path(output_dir).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(output_dir) / "done").write_text(str(train.steps))
    return 3 if train.steps == 30 else 0

sys.exit(module.exit_status(lambda: module.launch("main", sys.argv[1:], read, run)))
"""


def start(conf: Path, *arguments: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(conf=str(conf))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=conf.parent, capture_output=True, text=True, timeout=60
    )


def written(conf: Path) -> dict[str, str]:
    return {str(path.relative_to(conf.parent)): path.read_text() for path in conf.parent.rglob("done")}


def test_a_program_runs_in_its_output_folder(conf):
    result = start(conf, "train.steps=5", "output_dir=here")
    assert result.returncode == 0, result.stderr
    assert written(conf) == {"here/done": "5"}


def test_a_sweep_runs_every_point_and_returns_the_worst_status(conf):
    result = start(conf, "--multirun", "train.steps=20,30")
    assert result.returncode == 3, result.stderr
    assert written(conf) == {"out/0/done": "20", "out/1/done": "30"}


@pytest.mark.parametrize(
    "arguments", [["train.steps=x"], ["train.steps=40"], ["train.stepz=1"], ["--multirun", "train.steps=5,x"]]
)
def test_a_mistake_ends_with_status_2_one_line_and_nothing_written(conf, arguments):
    before = sorted(conf.parent.rglob("*"))
    result = start(conf, *arguments)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert "train.step" in result.stderr
    assert sorted(conf.parent.rglob("*")) == before


def test_the_composed_config_is_shown_on_request(conf, capsys):
    assert show_text("main", ["--cfg", "job", "train.steps=7"]) == 0
    assert "steps: 7" in capsys.readouterr().out
    assert written(conf) == {}
