"""Composing and checking configs: right values become typed, a wrong one is one line that says how to mend it."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Literal

import pytest
import yaml
from omegaconf import OmegaConf
from pydantic import Field

from seqtrain import config as config_module
from seqtrain.config import compose_config, launch, read_settings, show_text
from seqtrain.data import DataConfig
from seqtrain.errors import ConfigError, exit_status
from seqtrain.overrides import quote_text
from seqtrain.planning.plan import Settings as PlanSettings
from seqtrain.validation import validate
from tests.command_cases import refused


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
    with refused(message):
        validate(Program, {"train": GOOD["train"] | train})


def test_a_missing_value_is_named():
    with refused("train.dtype: is required"):
        validate(Program, {"train": {"steps": 1}})


@pytest.mark.parametrize("path", ["~/books", "$HOME/books", "/home/me/books"])
def test_paths_are_those_of_who_runs_it(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert validate(DataConfig, {"path": path}).path == "/home/me/books"


TEXTS = ["Hello, world: x", "def main(", "<|end|>", "~/books", "a=b (ü)", 'it\'s "so"', "null", "12", "[a", "\\", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text):
    assert compose_config("generate", [f"prompt={text}"]).prompt == text
    assert compose_config("pretrain", [f"data.path={text}"]).data.path == text
    assert read_settings(PlanSettings, [f"output_dir={text}"]).output_dir == text


def test_quotes_of_hydra_s_grammar_stay_quotes():
    assert compose_config("generate", ["prompt='a, b'"]).prompt == "a, b"
    assert read_settings(PlanSettings, ["output_dir='a b'"]).output_dir == "a b"


def test_a_sweep_runs_over_texts_that_need_quotes():
    assert quote_text(["path=~/a,~/b", "lr=1,2"], {"path": "text"}, sweep=True) == ['path="~/a","~/b"', "lr=1,2"]


@pytest.fixture
def run_folder(tmp_path):
    words = ["model.depth=3", "model.layers=[gla]", "mixer.gla.gate_rank=4", "runtime=inline", "train.steps=7"]
    config = compose_config("pretrain", [*words, f"output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return tmp_path


def test_a_run_s_own_config_is_the_base_of_what_resumes_it(run_folder):
    config = compose_config("pretrain", [f"run={run_folder}", "checkpoint.every=9", "tracking=none", "model.heads=4"])
    before = OmegaConf.load(run_folder / "config.yaml")
    changed = {"checkpoint.every": 9, "tracking.mode": "disabled"}
    for key, value in changed.items():
        assert OmegaConf.select(config, key) == value
        OmegaConf.update(before, key, value)
    assert config == before


def test_a_typed_value_counts_though_it_is_the_default(run_folder):
    default = compose_config("pretrain").train.steps
    assert compose_config("pretrain", [f"run={run_folder}", f"train.steps={default}"]).train.steps == default


def test_a_mixer_s_key_of_a_run_can_change_alone(run_folder):
    mixer = compose_config("pretrain", [f"run={run_folder}", "mixer.gla.expand_key=0.25"]).mixer.gla
    assert (mixer.expand_key, mixer.gate_rank) == (0.25, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=/no/such/run"], "run=/no/such/run: holds no config.yaml"),
        (["run=RUN", "train.stepz=1"], "config key 'train.stepz' is unknown"),
    ],
)
def test_a_mistake_next_to_run_is_one_line(run_folder, words, message):
    with refused(message):
        compose_config("pretrain", [word.replace("RUN", str(run_folder)) for word in words])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.layers=gla,attention", "model.layers=gla,attention: type 'model.layers=[gla,attention]'"),
        ("model.layers=[gla,a(b]", """model.layers=[gla,a(b]: type 'model.layers=[gla,"a(b"]'"""),
        ("model.layers=[gla", "model.layers=[gla: type 'model.layers=[gla]'"),
        ("optimizer.lr=1,2", "optimizer.lr=1,2: takes one value; type --multirun optimizer.lr=1,2 for one run"),
        ("model=3", "model= '3' is unknown"),
        ("train.steps", "'train.steps' is not key=value"),
        ("sample.prompt=${x}", "sample.prompt: ${x} names no key; type \\${x} for the text itself"),
    ],
)
def test_what_hydra_can_t_take_comes_with_what_to_type(word, message):
    with refused(message):
        compose_config("pretrain", [word])


@pytest.fixture
def conf(tmp_path, monkeypatch):
    files = {
        "main.yaml": """
            defaults:
              - optimizer: quick
              - experiment: none
              - mixer: all
              - _self_
              - override hydra/job_logging: none
              - override hydra/hydra_logging: none
            output_dir: out
            train: {steps: 10, dtype: float32}
            presets: {}
            hydra:
              output_subdir: null
              run: {dir: "."}
              sweep: {dir: "${output_dir}", subdir: "${hydra.job.num}"}
            """,
        "optimizer/quick.yaml": "lr: 0.1",
        "experiment/none.yaml": "{}",
        "experiment/long.yaml": "length: 2",
        "mixer/gla.yaml": "gate_rank: 2",
    }
    for name, text in files.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    monkeypatch.setattr(config_module, "conf_dir", lambda: tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf"


def test_a_mixer_has_its_dataclass_s_values_then_its_file_s_then_those_typed(conf):
    mixers = compose_config("main", ["mixer.gla.expand_key=0.75", "mixer.sliding_attention.window=3"]).mixer
    assert (mixers.gla.expand_key, mixers.gla.gate_rank, mixers.gla.expand_value) == (0.75, 2, 1.0)
    assert (mixers.sliding_attention.window, mixers.sliding_attention.query_group) == (3, 1)


def test_defaults_are_those_of_the_folder_in_use(conf, monkeypatch):
    # Hydra has one store for all folders: from the project's own to another and back.
    with monkeypatch.context() as own:
        own.setattr(config_module, "conf_dir", lambda: Path(__file__).parents[1] / "conf")
        compose_config("pretrain")
    assert compose_config("main").mixer.gla.gate_rank == 2
    monkeypatch.undo()
    config = compose_config("pretrain", ["schedule=linear"])
    assert (config.mixer.gla.gate_rank, config.schedule.name) == (16, "linear")
    assert config.presets.schedule == "linear"


def test_what_was_chosen_is_noted_and_null_means_none(conf):
    assert compose_config("main", ["experiment=long"]).presets == {"optimizer": "quick", "experiment": "long"}
    assert compose_config("main", ["experiment=null"]).presets.experiment == "none"
    assert "experiment" not in compose_config("main", ["~experiment"]).presets


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "'train.stepz' is unknown; did you mean 'train.steps'? Known: train.dtype, train.steps"),
        ("trian.steps=1", "config key 'trian' is unknown; did you mean 'train'? Known: "),
        ("optimzer=adamw", "config key 'optimzer' is unknown; did you mean 'optimizer'? Known: "),
        ("optimizer=adamv", "optimizer= 'adamv' is unknown; did you mean 'adamw'? Known: adamw, aro, "),
        ("mixer.s5.block=1", "config key 'mixer.s5.block' is unknown; did you mean 'mixer.s5.blocks'? Known: "),
        ("train.steps=[1", "train.steps=[1: "),
        ("train.steps=${nothing}", "train.steps: ${nothing} names no key"),
    ],
)
def test_a_wrong_override_is_one_line(conf, override, message):
    with refused(message):
        compose_config("main", [override])


@pytest.fixture
def start(conf):
    """Launches a program that writes the number of its steps into its output folder; gives its status."""

    def run(config) -> int:
        train = validate(Train, OmegaConf.to_container(config.train), prefix="train.")
        if train.steps == 40:
            raise ConfigError("train.steps=40: found out late")
        folder = conf.parent / config.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done").write_text(str(train.steps))
        return 3 if train.steps == 30 else 0

    def read(config):
        validate(Train, OmegaConf.to_container(config.train), prefix="train.")
        return config

    def outcome(folder):
        return f"did {(conf.parent / folder / 'done').read_text()}"

    return lambda *arguments: exit_status(lambda: launch("main", arguments, read, run, outcome))


def written(conf) -> dict[str, str]:
    return {str(path.relative_to(conf.parent)): path.read_text() for path in conf.parent.rglob("done")}


def test_a_program_runs_in_its_output_folder(conf, start):
    assert start("train.steps=5", "output_dir=here") == 0
    assert written(conf) == {"here/done": "5"}


def test_a_sweep_runs_every_point_and_returns_the_worst_status(conf, start, capsys):
    assert start("train.steps=20,30", "--multirun", "train.dtype=float32") == 3
    assert written(conf) == {"out/0/done": "20", "out/1/done": "30"}
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("point ")] == [
        "point 1 of 2: train.steps=20",
        "point 2 of 2: train.steps=30",
    ]
    assert lines[-2:] == [f"train.steps=20  did 20  {conf.parent / 'out/0'}", "train.steps=30  failed"]


@pytest.mark.parametrize(
    "arguments", [["train.steps=x"], ["train.steps=40"], ["train.stepz=1"], ["--multirun", "train.steps=5,x"]]
)
def test_a_mistake_ends_with_status_2_one_line_and_nothing_written(conf, start, capsys, arguments):
    before = sorted(conf.parent.rglob("*"))
    assert start(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("error: ")
    assert "train.step" in printed
    assert sorted(conf.parent.rglob("*")) == before


def test_the_composed_config_is_shown_on_request(conf, capsys):
    assert show_text("main", ["--cfg", "job", "train.steps=7"]) == 0
    assert "steps: 7" in capsys.readouterr().out
    assert written(conf) == {}


def test_nothing_of_the_environment_gets_into_a_config(tmp_path, monkeypatch):
    """What is typed is refused; what a run's config holds is text, with any number of backslashes."""
    monkeypatch.setenv("SECRET", "hunter2")
    for word in ("tracking.name=${oc.env:SECRET}", "sample.prompt=a-${ oc.env:SECRET,x}"):
        with refused("is not read, for it would stand in config.yaml"):
            compose_config("pretrain", [word])
    texts = ["${oc.env:SECRET}", "\\${oc.env:SECRET}", "a\\\\${seed}\\", "${", "\\$", "plain\\"]
    values = OmegaConf.to_container(compose_config("pretrain"), resolve=True)
    for text in texts:
        values["sample"]["prompt"] = text
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        config = compose_config("pretrain", [f"run={tmp_path}", r"tracking.name=\${seed}"])
        resolved = OmegaConf.to_container(config, resolve=True)
        assert (resolved["sample"]["prompt"], resolved["tracking"]["name"]) == (text, "${seed}")
