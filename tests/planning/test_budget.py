"""Which parts are computed again for a budget of memory."""

from dataclasses import replace

import pytest
import yaml

from seqtrain.errors import ConfigError
from seqtrain.planning import budget
from seqtrain.planning.budget import CHOICES, choices, within_budget
from seqtrain.planning.layout import Machine
from seqtrain.planning.run_config import count_run
from seqtrain.runtime.run import run
from tests.runtime.runtime_cases import folder_of, on_ranks, small_config

VOCAB = 64


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two layers on rows long enough that activations are most of what a rank holds."""
    monkeypatch.setattr(budget, "_machine", lambda config: Machine("nothing but the model", memory=1.0))
    return small_config(tmp_path, "gla", "attention", train={"sequence_length": 512, "batch_size": 2})


def with_budget(config, size):
    return replace(config, train=replace(config.train, memory_budget=size))


@pytest.mark.all
def test_the_cheapest_that_fits(config, monkeypatch):
    found = {choice.recompute: choice for choice in choices(config, VOCAB)}
    monkeypatch.setattr(budget, "choices", lambda *told: found.values())
    assert found.keys() == CHOICES.keys()
    ordered = sorted(found.values(), key=lambda choice: choice.seconds)
    assert ordered[0].recompute == ()
    for fits in ordered:
        chosen, said = within_budget(with_budget(config, fits.bytes), VOCAB)
        expected = next(choice for choice in ordered if choice.bytes <= fits.bytes)
        assert chosen.model.recompute == expected.recompute
        assert f"model.recompute=[{','.join(expected.recompute)}]" in said
    # Halves that are put together are what is counted in one.
    both = replace(config, model=replace(config.model, recompute=("norm", "mlp")))
    counted = count_run(both, vocab_size=VOCAB, rows=2).saved_bytes(checkpointing=False)
    plain = count_run(config, vocab_size=VOCAB, rows=2).saved_bytes(checkpointing=False)
    saved = found[()].bytes - found["norm", "mlp"].bytes
    assert 0 < saved <= 1.01 * (plain - counted)


def test_parts_that_are_named_stay(config):
    named = with_budget(replace(config, model=replace(config.model, recompute=("mlp",))), 1e3)
    assert within_budget(named, VOCAB) == (named, "")
    assert within_budget(config, VOCAB) == (config, "")


@pytest.mark.all
def test_what_fits_nothing_is_refused(config):
    with pytest.raises(
        ConfigError, match=r"train\.memory_budget=1000: is 0\.00 GiB a rank, but with model\.recompute="
    ):
        within_budget(with_budget(config, 1e3), VOCAB)


@pytest.mark.all
def test_a_run_keeps_what_was_chosen(config, tmp_path):
    least = min(choices(config, 257), key=lambda choice: choice.bytes)
    config = with_budget(replace(config, train=replace(config.train, steps=1)), least.bytes * 1.001)
    on_ranks(1, lambda rank: run(config) and None)
    kept = yaml.safe_load((folder_of(config).path / "config.yaml").read_text())
    assert tuple(kept["model"]["recompute"]) == least.recompute
    assert "memory: model.recompute=" in folder_of(config).log.read_text()
