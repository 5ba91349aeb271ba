"""Every file in conf/ composes with the others, passes the checks, and builds a model; and who overrides whom."""

import pytest
import torch

from seqtrain.config import compose_config, conf_dir
from seqtrain.models import LanguageModel
from seqtrain.runtime import read_pretrain_config

GROUPS = ("model", "data", "optimizer", "schedule", "tracking", "experiment")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("[!_]*.yaml"))]
NAMES = ["optimizer=adamw", "optimizer=muon", "schedule=cosine", "runtime=ray", "runtime=inline"]


def read(*overrides):
    return read_pretrain_config(compose_config("pretrain", [*overrides, "data.path=x"]))


@pytest.mark.parametrize("choice", [*CHOICES, *NAMES])
def test_a_choice_composes_and_builds(choice):
    config = read(choice)
    with torch.device("meta"):
        model = LanguageModel(config.model, config.mixer, vocab_size=257)
    assert len(model.blocks) == config.model.depth
    assert set(config.mixer) == set(config.model.layers)
    group, _, name = choice.partition("=")
    assert config.presets[group] == name


def test_every_file_is_named_in_a_group():
    assert {path.parent.name for path in conf_dir().rglob("*.yaml")} <= {*GROUPS, "fit", "mixer", "recipe", "conf"}
    assert {path.stem for path in (conf_dir() / "fit").glob("[!_]*.yaml")} < {
        path.stem for path in (conf_dir() / "data").glob("*.yaml")
    }


# What a choice settles: train.steps, train.sequence_length, train.batch_size, optimizer.lr, the window.
LAPTOP = (100, 512, 16, 3e-3, 128)
OWN_TEXT = (1000, 1024, 8, 3e-3, 128)
GPT2_SMALL = (20000, 2048, 128, 6e-4, 512)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ([], LAPTOP),
        (["model=hybrid_tiny", "data=stdlib"], LAPTOP),
        (["experiment=null"], LAPTOP),
        (["~experiment"], LAPTOP),
        (["data=text"], OWN_TEXT),
        (["model=hybrid_125m"], GPT2_SMALL),
        (["model=hybrid_125m", "data=text"], GPT2_SMALL),
        (["model=hybrid_125m", "experiment=quickstart"], LAPTOP),
        (["experiment=long_sequence"], (4, 262144, 1, 3e-3, 128)),
        (["model=hybrid_125m", "train.steps=7", "mixer.sliding_attention.window=9"], (7, 2048, 128, 6e-4, 9)),
        (["experiment=long_sequence", "train.steps=7"], (7, 262144, 1, 3e-3, 128)),
    ],
)
def test_no_preset_overrides_what_the_user_chose(overrides, values):
    config = read(*overrides, "model.layers=[sliding_attention]")
    train, window = config.train, config.mixer["sliding_attention"].window
    assert (train.steps, train.sequence_length, train.batch_size, config.optimizer.lr, window) == values


def test_what_follows_from_what_is_there_is_auto(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    quickstart = read()
    assert (quickstart.parallel.data, quickstart.train.micro_batch_size) == (2, 8)
    assert quickstart.runtime.cpus_per_worker == 1
    inline = read("runtime=inline")
    assert (inline.parallel.data, inline.train.micro_batch_size) == (1, 8)
    assert inline.runtime.cpus_per_worker == torch.get_num_threads()
    assert read("parallel.sequence=2").parallel.data == 1
    assert read("train.batch_size=6", "runtime=inline").train.micro_batch_size == 6
    assert read("train.batch_size=9").parallel.data == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert read("parallel.sequence=2").parallel.data == 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read("runtime=inline", "parallel.sequence=2").parallel.data == 2
