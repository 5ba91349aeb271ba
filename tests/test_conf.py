"""Every file in conf/ composes with the others, passes the checks, and builds a model."""

import pytest
import torch

from seqtrain.config import compose_config, conf_dir
from seqtrain.models import LanguageModel
from seqtrain.runtime import read_pretrain_config

GROUPS = ("model", "data", "optimizer", "schedule", "parallel", "runtime", "tracking", "experiment")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]


def test_every_group_has_a_choice():
    assert {choice.split("=")[0] for choice in CHOICES} == set(GROUPS)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_composes_and_builds(choice):
    # `inline` wants as many ranks as there are processes: one, here.
    config = read_pretrain_config(compose_config("pretrain", [choice, "parallel.data=1"]))
    with torch.device("meta"):
        model = LanguageModel(config.model, config.mixer, vocab_size=257)
    assert len(model.blocks) == config.model.depth
    assert set(config.mixer) == set(config.model.layers)


def test_every_file_is_named_in_a_group():
    assert {path.parent.name for path in conf_dir().rglob("*.yaml")} <= {*GROUPS, "mixer", "recipe", "profile", "conf"}
