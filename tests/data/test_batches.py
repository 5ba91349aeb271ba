from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seqtrain.data import Batches, BatchSlice, EvaluationBatches, prepare
from seqtrain.data.packing import BestFit, ShuffledWindows, Windows, permute
from seqtrain.errors import ConfigError, DataError


def evaluation(stream, length, **options):
    return EvaluationBatches(Windows(stream, length=length), **options)


def start_of(batches, sample):
    return batches.row(sample).spans[0].start


def by_hand(stream, start, length):
    """Tokens, labels and boundaries of one row, token by token."""
    whole = stream.read(0, stream.tokens).tolist()
    begins = set(stream.starts(0, stream.tokens).tolist())
    tokens, labels, boundaries = [], [], []
    for position in range(start, start + length):
        inside = position < stream.tokens
        tokens.append(whole[position] if inside else stream.tokenizer.end)
        follows = position + 1 < stream.tokens and position + 1 not in begins
        labels.append(whole[position + 1] if follows else -100)
        if position > start and (position in begins or position == stream.tokens):
            boundaries.append(position - start)
    return tokens, labels, boundaries


@pytest.mark.parametrize("length", [1, 7, 64, 999])
def test_rows_labels_and_boundaries_against_a_loop_over_tokens(corpus, length):
    batches = evaluation(corpus.held_out, length, batch_size=2)
    for index in {0, len(batches) // 2, len(batches) - 1}:
        batch = batches.at(index)
        tokens, labels, boundaries = [], [], [0]
        for row in range(2):
            row_tokens, row_labels, inner = by_hand(corpus.held_out, (2 * index + row) * length, length)
            if (2 * index + row) * length >= corpus.held_out.tokens:
                inner = []
            tokens += row_tokens
            labels += row_labels
            boundaries += [row * length + place for place in inner] + [(row + 1) * length]
        assert batch.tokens.tolist() == [tokens]
        assert batch.labels.tolist() == [labels]
        assert batch.cu_seqlens.tolist() == boundaries
        assert batch.label_count == sum(label != -100 for label in labels)
        assert batches.text_bytes(batch) == sum(label not in (-100, 256) for label in labels)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)


def test_documents_can_share_a_state(corpus):
    whole = evaluation(corpus.held_out, 1500, batch_size=2, reset_at_documents=False).at(0)
    apart = evaluation(corpus.held_out, 1500, batch_size=2).at(0)
    assert whole.cu_seqlens.tolist() == [0, 1500, 3000]
    assert len(apart.cu_seqlens) > 3
    assert torch.equal(whole.tokens, apart.tokens)
    assert torch.equal(whole.labels, apart.labels)


def training(corpus, seed=3, batch_size=8, length=50, **options):
    return Batches(ShuffledWindows(corpus.train, length=length, seed=seed), batch_size=batch_size, **options)


def test_batches_follow_from_seed_and_step_alone(corpus, config):
    again = prepare(config, progress=False)
    for step in (0, 5, 10_000):
        first, second = training(corpus).at(step), training(again).at(step)
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.cu_seqlens, second.cu_seqlens)
    assert not torch.equal(training(corpus).at(0).tokens, training(corpus).at(1).tokens)
    assert not torch.equal(training(corpus).at(0).tokens, training(corpus, seed=4).at(0).tokens)


def batches_of(corpus, kind, length):
    """Training batches, or those of evaluation, each of eight rows."""
    if kind == "train":
        return training(corpus, length=length)
    if kind == "best_fit":
        return Batches(BestFit(corpus.train, length=length, seed=0), batch_size=8)
    return evaluation(corpus.held_out, length, batch_size=8)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["train", "held_out", "best_fit"])
def test_the_union_over_ranks_and_micro_batches_is_the_same(corpus, ranks, kind):
    batches = batches_of(corpus, kind, 50)
    whole = batches.at(2)
    for micro_batches in [m for m in (1, 2, 4) if ranks * m <= 8]:
        parts = [
            batches.at(2, BatchSlice(rank=rank, ranks=ranks, micro_batch=micro, micro_batches=micro_batches))
            for micro in range(micro_batches)
            for rank in range(ranks)
        ]
        assert torch.equal(torch.cat([part.tokens for part in parts], dim=1), whole.tokens)
        assert torch.equal(torch.cat([part.labels for part in parts], dim=1), whole.labels)
        shifts = [0, *np.cumsum([part.tokens.shape[1] for part in parts])]
        boundaries = {int(b) + int(s) for part, s in zip(parts, shifts, strict=False) for b in part.cu_seqlens}
        assert sorted(boundaries) == whole.cu_seqlens.tolist()


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 400])
@pytest.mark.parametrize("kind", ["train", "held_out", "best_fit"])
def test_the_parts_of_a_row_are_the_row_cut_into_nearly_equal_pieces(corpus, parts, kind):
    batches = batches_of(corpus, kind, 47)
    step = len(batches) - 1 if kind == "held_out" else 3  # some of it is filling
    whole = batches.at(step, BatchSlice(rank=1, ranks=2))
    pieces = [batches.at(step, BatchSlice(rank=1, ranks=2, part=part, parts=parts)) for part in range(parts)]
    offsets = pieces[0].offsets
    assert (whole.offsets, offsets[0], offsets[-1], len(offsets)) == ((0, 188), 0, 188, parts + 1)
    sizes = np.diff(offsets)
    assert sizes.max() - sizes.min() <= 1
    for part, piece in enumerate(pieces):
        assert piece.offsets == offsets
        assert torch.equal(piece.cu_seqlens, whole.cu_seqlens), "boundaries are those of the whole row"
        assert torch.equal(piece.tokens, whole.tokens[:, offsets[part] : offsets[part + 1]])
        assert torch.equal(piece.labels, whole.labels[:, offsets[part] : offsets[part + 1]])
    assert sum(piece.label_count for piece in pieces) == whole.label_count


def test_a_part_reads_no_more_than_its_own_tokens(corpus, monkeypatch):
    batches = training(corpus, length=500)
    read, asked = corpus.train.read, []
    monkeypatch.setattr(corpus.train, "read", lambda start, stop: asked.append(stop - start) or read(start, stop))
    batches.at(0, BatchSlice(part=1, parts=3))
    # 4000 tokens in rows of 500: the second third touches rows 2 to 5, and reads one label beyond each piece.
    assert sum(asked) <= 1334 + 4


def test_an_epoch_reads_every_window_once(corpus):
    batches = training(corpus, batch_size=1)
    windows = batches.packing.rows(0)
    for epoch in range(2):
        starts = sorted(start_of(batches, epoch * windows + place) for place in range(windows))
        assert set(np.diff(starts).tolist()) == {50}
        assert starts[0] >= 0
        assert starts[-1] + 50 <= corpus.train.tokens
    assert windows == corpus.train.tokens // 50


def test_epochs_cut_at_other_places(corpus):
    batches = training(corpus, batch_size=1, length=1100)
    assert len({start_of(batches, epoch * batches.packing.rows(epoch)) % 1100 for epoch in range(10)}) > 5


@pytest.mark.parametrize("length", [33, 500, 10_000])
def test_evaluation_predicts_every_token_once(corpus, length):
    stream = corpus.held_out
    batches = evaluation(stream, length, batch_size=4)
    parts = [batches.at(index, BatchSlice(rank=rank, ranks=2)) for index in range(len(batches)) for rank in range(2)]
    assert {part.tokens.shape for part in parts} == {(1, 2 * length)}
    labels = torch.cat([part.labels for part in parts], dim=1)
    counted = labels[labels != -100].numpy()
    whole = stream.read(0, stream.tokens)
    expected = np.delete(whole, stream.starts(0, stream.tokens))
    np.testing.assert_array_equal(counted, expected)
    assert sum(map(batches.text_bytes, parts)) == stream.predicted_bytes == stream.bytes - stream.documents


def test_evaluation_of_a_few_windows_spreads_them(corpus):
    batches = evaluation(corpus.held_out, 20, batch_size=4, limit=10)
    starts = [start_of(batches, sample) for sample in range(10)]
    assert len(batches) == 3
    assert starts[0] == 0
    assert sorted(set(starts)) == starts
    assert starts[9] > 0.8 * corpus.held_out.tokens
    # The rows beyond the limit are filling.
    assert [batches.row(sample).spans for sample in (10, 11)] == [(), ()]
    assert batches.at(2, BatchSlice(rank=1, ranks=2)).label_count == 0


def test_a_tokenizer_that_normalises_is_scored_on_the_raw_text(config, tmp_path, bpe_folder, small_steps):
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    backend.normalizer = normalizers.Replace("alpha", "a")
    backend.save(str(tmp_path / "tokenizer.json"))
    corpus = prepare(replace(config, tokenizer=str(tmp_path / "tokenizer.json"), end_token="<|end|>"), progress=False)
    stream = corpus.held_out
    assert stream.byte_scale > 1.05
    batches = evaluation(stream, 100, batch_size=2)
    total = sum(batches.text_bytes(batches.at(index)) for index in range(len(batches)))
    assert total == pytest.approx(stream.predicted_bytes, rel=1e-9)
    assert total == pytest.approx(stream.bytes, rel=0.01)


def test_uneven_shares_are_the_whole_batch_once(corpus):
    """8 rows over 3 x 3 slices: the last has none, and reads a row without labels."""
    batches = training(corpus)
    slices = [BatchSlice(rank, 3, number, 3, uneven=True) for number in range(3) for rank in range(3)]
    parts = [batches.at(1, each) for each in slices]
    assert sorted(part.tokens.shape[1] for part in parts) == [batches.layout.length] * 9
    whole = batches.at(1)
    held = [part for each, part in zip(slices, parts, strict=True) if each.rows(8)]
    assert len(held) == 8
    assert torch.equal(torch.cat([part.tokens for part in held], 1), whole.tokens)
    assert sum(part.label_count for part in parts) == whole.label_count


def test_sizes_that_do_not_come_out_even(corpus):
    with pytest.raises(ConfigError, match=r"train\.batch_size=8: must be a multiple of .* = 3 x 2; use 12"):
        training(corpus).at(0, BatchSlice(ranks=3, micro_batches=2))
    with pytest.raises(ConfigError, match=r"train\.sequence_length=0: at least 1"):
        training(corpus, length=0)
    with pytest.raises(DataError, match=r"train\.sequence_length=1000000: the train text has only \d+ tokens"):
        training(corpus, length=1_000_000)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_bijection_in_an_order_of_its_own(size):
    cases = [(seed, epoch) for seed in (7, 8) for epoch in range(3)]
    orders = [tuple(permute(place, size, *case) for place in range(size)) for case in cases]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert len(set(orders)) == len(orders)


def test_the_order_is_pinned():
    # A change of the order silently breaks every run that is resumed.
    expected = [(0, 0), (0, 7), (0, 2), (0, 5), (0, 9), (0, 6), (0, 3), (0, 4), (0, 1), (0, 8), (1, 2), (1, 3)]
    packing = ShuffledWindows(SimpleNamespace(tokens=10), length=1, seed=0)
    placed = [packing.locate(sample) for sample in range(12)]
    assert [(epoch, packing.spans(epoch, row)[0].start) for epoch, row in placed] == expected


class Lengths:
    """A stream of documents of these lengths, as far as packing reads one."""

    name = "train"

    def __init__(self, lengths):
        self.edges = np.concatenate([[0], np.cumsum(lengths)])
        self.documents, self.tokens = len(lengths), int(self.edges[-1])

    def document_starts(self, first, stop):
        return self.edges[first:stop]


def long_tailed(count, mean=6.0):
    return np.maximum(np.random.default_rng(0).lognormal(mean, 1.2, count), 2).astype(np.int64)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_best_fit_reads_every_token_once_an_epoch(monkeypatch, most):
    monkeypatch.setattr("seqtrain.data.packing.GROUP", 8)
    monkeypatch.setattr("seqtrain.data.packing.BLOCK", 64)
    stream, length = Lengths(long_tailed(300, mean=4.0)), 100
    packing = BestFit(stream, length=length, seed=5, documents_per_row=most)
    again, number = BestFit(stream, length=length, seed=5, documents_per_row=most), 0
    for epoch in range(3):
        read = np.zeros(stream.tokens, dtype=int)
        for row in range(packing.rows(epoch)):
            assert packing.locate(number) == (epoch, row)
            spans = packing.spans(epoch, row)
            assert sum(stop - start for start, stop in spans) <= length
            assert 1 <= len(spans) <= (most or length)
            for start, stop in spans:
                read[start:stop] += 1
                # Pieces are cut from a document's start, and so only long documents are cut.
                begin = stream.edges[np.searchsorted(stream.edges, start, side="right") - 1]
                assert (start - begin) % length == 0
                assert stop - start == length or stop in stream.edges
            number += 1
        assert (read == 1).all()
    # The same rows for one who begins in the midst.
    assert again.spans(*again.locate(number - 1)) == packing.spans(*packing.locate(number - 1))
    assert packing.spans(0, 0) != packing.spans(1, 0)


def test_best_fit_fills_rows_of_a_long_tailed_corpus():
    lengths = long_tailed(3000)
    for length in (512, 2048):
        packing = BestFit(Lengths(lengths), length=length, seed=0)
        assert packing.fill == lengths.sum() / (packing.rows(0) * length) > 0.99
    single = BestFit(Lengths(lengths), length=512, seed=0, documents_per_row=1)
    assert single.rows(0) == (-(-lengths // 512)).sum()


def test_padded_rows_end_in_a_document_without_labels(corpus):
    packing = BestFit(corpus.train, length=700, seed=0, documents_per_row=1)
    batch = Batches(packing, batch_size=4).at(0)
    for number in range(4):
        [(start, stop)] = packing.spans(0, number)
        row = slice(700 * number, 700 * (number + 1))
        tokens, labels, _ = by_hand(corpus.train, start, stop - start)
        assert batch.tokens[0, row].tolist() == tokens + [256] * (700 - len(tokens))
        assert batch.labels[0, row].tolist() == labels + [-100] * (700 - len(labels))
        assert 700 * number + stop - start in batch.cu_seqlens.tolist()
    assert any(stop - start < 700 for row in range(4) for start, stop in packing.spans(0, row))
