"""How a run's weights begin: the same numbers however they are divided, and never more than a share and one of them."""

import gc
import hashlib
import time

import pytest
import torch

from seqtrain.memory import AnonymousPeak
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


def started(ranks, config):
    """The most memory above the process's own: until the engine is made, and until the first step is done."""
    small = change(config, model={"depth": 1, "width": 64, "heads": 1, "vocab_size": 64})
    step(engine_of(small, ranks, 64), config)
    gc.collect()
    with AnonymousPeak() as peak:
        engine = engine_of(config, ranks)
        time.sleep(2 * AnonymousPeak.INTERVAL)
        begun = peak.bytes
        step(engine, config)
    return begun, peak.bytes


def step(engine, config):
    row = torch.arange(config.train.sequence_length + 1)[None] % 50
    engine.backward(engine.model(row[:, :-1], row[:, 1:]), weight=1.0)
    engine.step()


@pytest.mark.full
def test_no_rank_holds_more_than_its_share_and_the_largest_weight(tmp_path):
    network = {"depth": 14, "width": 1024, "heads": 16, "vocab_size": 16384}
    train = {"batch_size": 4, "micro_batch_size": 1, "sequence_length": 64}
    config = small_config(tmp_path, "gla", "gated_delta_net", model=network, train=train, parallel=grid(4, 1, 3))
    model = build_model(config, VOCABULARY)
    assert model.parameter_count() > 190e6
    share = 16 * model.parameter_count() / 4 + max(each.nbytes for each in model.parameters())
    for begun, stepped in on_ranks(4, started, config):
        assert 0.5 * share < begun < 1.1 * share
        assert stepped < 2.2 * 1.1 * share
