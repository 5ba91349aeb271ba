"""How a run's weights begin: the same numbers however they are divided."""

import hashlib

import pytest

from seqtrain.runtime.engine import Engine
from seqtrain.runtime.optimizers import parameter_groups
from seqtrain.runtime.source import build_model, first_weights
from tests.runtime.runtime_cases import change, grid, on_ranks, small_config

VOCABULARY = 60


def engine_of(config, ranks, vocabulary=VOCABULARY):
    model = build_model(config, vocabulary)
    groups = parameter_groups(model.parameters(), config.optimizer.weight_decay)
    return Engine(model, groups, config, ranks, weights=first_weights(config, model))


def first_of(ranks, configs):
    """A hash of every weight of each run before its first step."""
    begun = (engine_of(config, ranks).weights() for config in configs)
    return [{name: hashlib.sha256(each.numpy().tobytes()).hexdigest() for name, each in ws} for ws in begun]


@pytest.mark.all
def test_weights_are_bit_equal_on_any_number_of_ranks_in_every_stage(tmp_path):
    layers = ("gla", "mamba2", "s5", "retnet", "rwkv7")
    base = small_config(tmp_path, *layers, train={"batch_size": 12, "micro_batch_size": 1})
    found = []
    for count in (1, 2, 3, 4):
        found += on_ranks(count, first_of, [change(base, parallel=grid(count, 1, stage)) for stage in range(4)])
    assert len(found) == 10
    expected = found[0][0]
    assert len(expected) > 40
    assert all(each == expected for rank in found for each in rank)
