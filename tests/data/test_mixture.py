"""Several sources in one run: whose each row is, in what shares, and what is wrong with an entry."""

import json
import random
from dataclasses import replace

import pytest
import torch

from seqtrain.data import BatchSlice, DataConfig, bigram_bits_per_byte, check_source, open_corpus, prepare
from seqtrain.data.entries import entries
from seqtrain.data.shares import Shares
from tests.command_cases import refused

SIZES = {"seed": 3, "sequence_length": 48, "batch_size": 12}


def config_of(text_folder, tmp_path, **fields):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": f"row {n} " * 9}) + "\n" for n in range(90)))
    sources = (
        {"text": str(text_folder), "weight": 0.5, "held_out": 0.2, "name": "books"},
        {"jsonl": str(tmp_path / "rows.jsonl"), "text_field": "body", "weight": [[0, 0.3], [40, 0.1]]},
        {"parity": None, "weight": 0.2, "held_out_rows": 5},
    )
    return DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"), held_out=0.1, **fields)


@pytest.fixture
def mixed(text_folder, tmp_path):
    return prepare(config_of(text_folder, tmp_path), progress=False)


def same(one, other):
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("tokens", "labels", "cu_seqlens")]
    return all(torch.equal(*pair) for pair in pairs) and one.sources == other.sources


@pytest.mark.all
def test_shares_are_those_of_the_weights_in_closed_form():
    cases = random.Random(0)
    for _ in range(8):
        size, batch = cases.randint(1, 12), cases.choice([1, 2, 7, 16])
        weights = [[(0, round(cases.random() ** 4, 4) + 1e-4)] for _ in range(size)]
        for weight in weights[::2]:
            weight += [(cases.randint(1, 25), cases.random()), (cases.randint(26, 45), cases.random())]
        shares, due, before = Shares(weights, batch), [0.0] * size, (0,) * size
        for step in range(50):
            # Shares are straight within a step: the mean of its ends is exact.
            ends = zip(shares.at(step), shares.at(step + 1), strict=True)
            due = [total + batch * (first + last) / 2 for total, (first, last) in zip(due, ends, strict=True)]
            counts = shares.counts((step + 1) * batch)
            assert sum(counts) == (step + 1) * batch
            assert all(now >= then for now, then in zip(counts, before, strict=True))
            assert max(abs(count - wanted) for count, wanted in zip(counts, due, strict=True)) < 2
            dealt = (shares if step % 10 else Shares(weights, batch)).deal(step)
            assert sorted(dealt) == [(n, row) for n in range(size) for row in range(before[n], counts[n])]
            before = counts


def test_a_thousand_steps_hold_their_shares():
    # Every figure here follows from the weights alone: no text is read.
    constant = Shares([[(0, 0.7)], [(0, 0.25)], [(0, 0.05)]], 8)
    assert constant.counts(8000) == (5600, 2000, 400)
    assert constant.counts(8 * 10**9) == (56 * 10**8, 2 * 10**9, 4 * 10**8)
    falling = Shares([[(0, 3), (1000, 1)], [(0, 1), (1000, 3)]], 8)
    assert falling.counts(8000) == (4000, 4000)
    # From 3/4 to 1/2 of the rows in the first half.
    assert falling.counts(4000) == (2500, 1500)
    assert falling.at(2000) == [0.25, 0.75]


def test_one_source_has_its_own_order(mixed, text_folder, tmp_path):
    config = config_of(text_folder, tmp_path)
    alone = prepare(replace(config, sources=config.sources[:1]), progress=False).training_batches(**SIZES)
    short = replace(config, sources=(), source="text", path=str(text_folder), held_out=0.2)
    plain = prepare(short, progress=False).training_batches(**SIZES)
    assert all(same(replace(alone.at(step), sources=()), plain.at(step)) for step in (0, 1, 500))


@pytest.mark.all
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_of_a_step_are_the_same_on_any_ranks_and_after_any_start(mixed, text_folder, tmp_path, ranks):
    config = config_of(text_folder, tmp_path, lengths=((0, 16), (20, 48)))
    batches = open_corpus(mixed.folder, config).training_batches(**SIZES)
    for step in (0, 19, 20, 37):
        whole = batches.at(step)
        again = prepare(config, progress=False).training_batches(**SIZES)
        parts = [again.at(step, BatchSlice(rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.tokens for part in parts], 1), whole.tokens)
        assert torch.equal(torch.cat([part.labels for part in parts], 1), whole.labels)
        assert sum((part.sources for part in parts), ()) == whole.sources
        shift = whole.tokens.shape[1] // ranks
        places = {place + n * shift for n, part in enumerate(parts) for place in part.cu_seqlens.tolist()}
        assert sorted(places) == whole.cu_seqlens.tolist()
        pieces = [again.at(step, BatchSlice(part=part, parts=ranks)) for part in range(ranks)]
        assert torch.equal(torch.cat([piece.tokens for piece in pieces], 1), whole.tokens)
        assert torch.equal(torch.cat([piece.labels for piece in pieces], 1), whole.labels)


@pytest.mark.all
def test_rows_are_those_of_their_sources_in_turn(mixed):
    batches = mixed.training_batches(**SIZES)
    alone = [part.training_batches(**SIZES) for part in mixed.parts]
    read = [0, 0, 0]
    for step in range(12):
        batch = batches.at(step)
        for number, source in enumerate(batch.sources):
            row = alone[source].at(read[source] // 12).tokens.view(12, 48)[read[source] % 12]
            assert torch.equal(batch.tokens.view(12, 48)[number], row)
            read[source] += 1
    assert tuple(read) == batches.shares.counts(144)
    windows = [part.train.tokens // 48 for part in mixed.texts.values()]
    assert batches.epochs(12) == {
        "epochs/books": pytest.approx(read[0] / windows[0]),
        "epochs/jsonl": pytest.approx(read[1] / windows[1]),
    }


@pytest.mark.all
def test_short_sequences_are_cut_out_of_the_rows(text_folder, tmp_path):
    config = config_of(text_folder, tmp_path, reset_at_documents=False)
    whole = prepare(config, progress=False).training_batches(**SIZES)
    cut = prepare(replace(config, lengths=((0, 16), (20, 48))), progress=False).training_batches(**SIZES)
    for step in (0, 19):
        plain, batch = whole.at(step), cut.at(step)
        assert torch.equal(batch.tokens, plain.tokens)
        assert torch.equal(batch.labels, plain.labels)
        # A task's row is one question.
        inside = [(0,) if source == 2 else (0, 16, 32) for source in batch.sources]
        places = [48 * row + place for row, own in enumerate(inside) for place in own]
        assert batch.cu_seqlens.tolist() == [*places, 576]
    assert same(cut.at(20), whole.at(20))


@pytest.mark.all
def test_parts_are_held_out_and_counted_apart(mixed, config, text_folder, tmp_path):
    batches = mixed.held_out_batches(sequence_length=48, batch_size=2, max_tokens=0)
    assert list(batches.parts) == ["books", "jsonl", "parity"]
    assert batches.parts["books"].packing.stream is mixed.texts["books"].held_out
    assert batches.parts["parity"].taken == 5
    full = config_of(text_folder, tmp_path, packing="best_fit", documents_per_row=3)
    assert [entry.config.packing for entry in entries(full)] == ["best_fit", "best_fit", "stream"]
    few = mixed.held_out_batches(sequence_length=48, batch_size=2, max_tokens=48 * 6)
    assert [part.taken for part in few.parts.values()] == [2, 2, 2]
    own = {"text": str(text_folder), "held_out_path": str(text_folder / "a" / "01.txt")}
    sources = (own, {"parity": {}, "held_out_rows": 1})
    corpus = prepare(replace(config, path="", source="stdlib", sources=sources), progress=False)
    assert corpus.texts["text"].held_out.bytes == (text_folder / "a" / "01.txt").stat().st_size
    lone = prepare(replace(config, held_out=0.2), progress=False)
    books = replace(mixed, parts=mixed.parts[:1], entries=mixed.entries[:1])
    assert bigram_bits_per_byte(books) == bigram_bits_per_byte(lone)


WRONG = [
    ([{"txt": "x"}], "config key 'data.sources.0.txt' is unknown; did you mean 'data.sources.0.text'?"),
    ([{"text": "x", "jsonl": "y"}], "data.sources.0: names text and jsonl; an entry has one kind of source"),
    ([{"weight": 1}], "data.sources.0: names none; an entry has one kind of source"),
    ([{"text": "x", "weight": 0}], "data.sources.0.weight=0: must be above 0"),
    ([{"text": "x", "weight": -1}], "data.sources.0.weight=-1: must be a number above 0"),
    ([{"text": "x", "weight": True}], "data.sources.0.weight=True: must be a number above 0"),
    ([{"text": "x", "weight": [[0, 1], [0, 2]]}], "data.sources.0.weight=[[0, 1], [0, 2]]: steps must rise"),
    ([{"text": "x", "weight": [[0.5, 1]]}], "data.sources.0.weight=[[0.5, 1]]: must be a number above 0, or a list"),
    ([{"text": "x", "weight": []}], "data.sources.0.weight=[]: must be a number above 0, or a list of steps"),
    (
        [{"text": "x", "weight": [[0, 1], [5, 0]]}, {"jsonl": "x", "weight": [[4, 1], [5, 0]]}],
        "data.sources: at step 5 the weights of all are 0",
    ),
    ([{"text": "x", "name": "a"}, {"text": "y", "name": "a"}], "data.sources.1.name=a: another entry has this name"),
    ([{"text": "x", "name": "a b"}], "data.sources.0.name=a b: must be letters"),
    ([{"text": 5}], "data.sources.0.text=5: must be a file, a folder or a pattern"),
    ([{"mqar": 5}], "data.sources.0.mqar=5: must hold the fields of data.task"),
    (
        [{"mqar": {"pears": 5}}],
        "data.sources.0: config key 'data.task.pears' is unknown; did you mean 'data.task.pairs'",
    ),
    ([{"mqar": {"pairs": 50}}], "data.sources.0: train.sequence_length=48: data.source=mqar with these data.task"),
    ([{"text": "x", "held_out": 2}], "data.sources.0.held_out=2: must be less than or equal to 0.5"),
]


@pytest.mark.parametrize(("sources", "message"), WRONG)
def test_what_is_wrong_with_an_entry_is_one_line(sources, message):
    with refused(message):
        check_source(DataConfig(sources=tuple(sources)), sequence_length=48)


def test_what_is_wrong_beside_the_entries_is_one_line(tmp_path):
    sources = ({"text": str(tmp_path / "no")}, {"mqar": {"keys": 300, "pairs": 2}})
    with refused("data.path=x: data.sources is given; write it into its entries"):
        check_source(DataConfig(sources=sources, path="x"), sequence_length=48)
    with refused("data.sources.0: data.path: ", Exception):
        prepare(DataConfig(sources=sources), progress=False)
    with refused("data.sources.0.mqar: has ids up to "):
        prepare(DataConfig(sources=sources[1:]), progress=False)
    for lengths, message in (
        (((0, 32),), "data.lengths=[[0, 32]]: 32 must divide train.sequence_length=48"),
        (((4, 16),), "data.lengths=[[4, 16]]: steps must rise, from 0 on"),
        (((0, 16), (0, 24)), "data.lengths=[[0, 16], [0, 24]]: steps must rise, from 0 on"),
    ):
        with refused(message):
            check_source(DataConfig(source="text", lengths=lengths), sequence_length=48)
    with refused("data.lengths: rows of data.source=parity, a task, are not cut"):
        check_source(DataConfig(source="parity", lengths=((0, 16),)), sequence_length=48)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_million_tiny_documents_beside_one_of_300_mb(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"".join(b"%08d\n" % n for n in range(300_000_000 // 9)))
    with (tmp_path / "tiny.jsonl").open("w") as file:
        file.writelines(f'{{"text": "{n}"}}\n' for n in range(2_000_000))
    sources = (
        {"text": str(tmp_path / "long.txt"), "weight": 0.6},
        {"jsonl": str(tmp_path / "tiny.jsonl"), "weight": 0.4},
    )
    corpus = prepare(DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"), held_out=0.01), progress=False)
    assert corpus.texts["jsonl"].train.documents + corpus.texts["jsonl"].held_out.documents == 2_000_000
    batches = corpus.training_batches(seed=0, sequence_length=2048, batch_size=12)
    dealt = [0, 0]
    for step in range(1000):
        for source, _ in batches.shares.deal(step):
            dealt[source] += 1
    assert dealt == [7200, 4800]
    for step in (0, 999, 10**6):
        whole = batches.at(step)
        assert whole.sources.count(0) in (7, 8)
        # A number and its end: the tiny ones are several hundred a row.
        assert len(whole.cu_seqlens) > 4 * 2048 / 9
        for ranks in (2, 3, 4):
            parts = [batches.at(step, BatchSlice(rank=rank, ranks=ranks)) for rank in range(ranks)]
            assert torch.equal(torch.cat([part.tokens for part in parts], 1), whole.tokens)
