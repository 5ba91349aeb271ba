"""Tokens an encoder is asked for: how many, what stands for them, that they are the same however a batch is cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from seqtrain.data.batches import IGNORED, BatchSlice
from seqtrain.data.masking import Masking
from seqtrain.errors import ConfigError
from seqtrain.runtime.checks import check
from tests.runtime.runtime_cases import small_config


def test_the_share_is_asked_for_and_most_of_it_behind_the_mask():
    ids = np.random.default_rng(0).integers(50, size=100_000)
    shown, asked = Masking(0.15, 50, seed=1).asked(ids, 1000, 3)
    assert asked.mean() == pytest.approx(0.15, abs=0.005)
    assert np.array_equal(shown[~asked], ids[~asked])
    assert (shown[asked] == 50).mean() == pytest.approx(0.8, abs=0.02)
    replaced = shown[asked & (shown != 50)]
    assert (replaced != ids[asked & (shown != 50)]).mean() == pytest.approx(0.5 * 49 / 50, abs=0.03)
    assert set(replaced.tolist()) == set(range(50))


def test_it_follows_from_seed_row_and_place_alone():
    ids = np.arange(1000) % 50
    shown, asked = Masking(0.3, 50, seed=1).asked(ids, 0, 3)
    part, part_asked = Masking(0.3, 50, seed=1).asked(ids[400:700], 400, 3)
    assert np.array_equal(part, shown[400:700])
    assert np.array_equal(part_asked, asked[400:700])
    for other in (Masking(0.3, 50, seed=2).asked(ids, 0, 3), Masking(0.3, 50, seed=1).asked(ids, 0, 4)):
        assert not np.array_equal(other[1], asked)


def test_a_batch_asks_for_its_own_tokens_however_it_is_cut(corpus):
    masked = replace(corpus, config=replace(corpus.config, masked=0.3))
    sizes = {"seed": 5, "sequence_length": 64, "batch_size": 2}
    plain, shown = (each.training_batches(**sizes).at(1) for each in (corpus, masked))
    asked = shown.labels != IGNORED
    assert 0.15 < asked.double().mean() < 0.45
    assert torch.equal(shown.labels[asked], plain.tokens[asked])
    assert torch.equal(shown.tokens[~asked], plain.tokens[~asked])
    assert int(shown.tokens.max()) == corpus.vocab_size == masked.vocab_size - 1
    parts = [masked.training_batches(**sizes).at(1, BatchSlice(part=part, parts=3)) for part in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts], 1), shown.tokens)
    assert torch.equal(torch.cat([part.labels for part in parts], 1), shown.labels)
    assert not torch.equal(masked.training_batches(**sizes | {"seed": 6}).at(1).labels, shown.labels)
    scored = masked.held_out_batches(sequence_length=64, batch_size=2, max_tokens=0)
    assert (scored.at(0).labels != IGNORED).any()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"model": {"kind": "encoder"}},
            r"^model\.kind=encoder: would see the next token, .* data\.masked=0\.15, or a task",
        ),
        ({"data": {"masked": 0.15}}, r"^data\.masked=0\.15: masks text of one source, for model\.kind=encoder"),
        (
            {"model": {"kind": "encoder"}, "data": {"source": "parity"}, "train": {"segment_tokens": 16}},
            r"^train\.segment_tokens=16: model\.kind=encoder reads whole sequences",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, fields, said):
    with pytest.raises(ConfigError, match=said):
        check(small_config(tmp_path, **fields))
