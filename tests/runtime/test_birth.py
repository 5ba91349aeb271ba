"""How a run's weights begin: the same numbers however they are divided."""

import hashlib

import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from torch.nn import functional as F

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
    found = []
    for config in configs:
        with engine_of(config, ranks).as_saved() as model, gathered(model):
            weights = {name: each.detach() for name, each in model.named_parameters()}
            found.append({n: hashlib.sha256(each.numpy().tobytes()).hexdigest() for n, each in weights.items()})
    return found


def gathered(model):
    """Holds all weights whole, in ZeRO 3 too."""
    return GatheredParameters([each for each in model.parameters() if "ds_id" in vars(each)])


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


def memory_of(ranks, config):
    """What a model of stage 3 has at most, bytes, beside the most seen at the start and until the first step's end."""
    with AnonymousPeak() as until_step:
        with AnonymousPeak() as start:
            engine = engine_of(config, ranks, vocabulary=16384)
        tokens = torch.randint(16384, (4, 64))
        logits, _ = engine.model(tokens, all_logits=True)
        engine.backward(F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum"), weight=1 / 256)
        engine.step()
    counts = [weight.ds_numel for weight in engine.module.parameters()]
    return 16 * sum(counts) / ranks.count + 4 * max(counts), start.bytes, until_step.bytes


@pytest.mark.full
def test_a_rank_of_stage_3_holds_little_more_than_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.runtime.runtime_cases.RANKS_SECONDS", 600)
    layers = ("gated_delta_net", "gated_delta_net", "gated_delta_net", "attention")
    config = small_config(tmp_path, *layers, train={"batch_size": 16, "micro_batch_size": 4, "sequence_length": 64})
    config = change(config, model={"depth": 14, "width": 1024, "heads": 8}, parallel=grid(4, 1, 3))
    for share, start, until_step in on_ranks(4, memory_of, config):
        assert start < 1.1 * share
        assert until_step < 2.2 * 1.1 * share
