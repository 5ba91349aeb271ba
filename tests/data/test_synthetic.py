"""Synthetic tasks: every answer against its definition, rows that follow from seed and index, runs that use them."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from seqtrain.data.batches import IGNORED, BatchSlice
from seqtrain.data.synthetic import TASKS, SyntheticBatches, examples, make_task
from seqtrain.errors import ConfigError
from tests.command_cases import refused

# Fields that make small rows, and a length that fits.
SMALL = {
    "digits": ({}, 70),
    "induction": ({"symbols": 5}, 12),
    "inverse_permutation": ({"things": 4, "symbols": 5, "scratch": 2}, 8),
    "listops": ({}, 24),
    "long_signal": ({}, 48),
    "match3": ({"modulus": 11, "numbers": 3}, 12),
    "match4": ({"modulus": 17, "numbers": 2}, 12),
    "mqar": ({"pairs": 4, "keys": 9, "values": 7}, 24),
    "parity": ({}, 10),
    "pathfinder": ({"side": 8, "share": 0.5}, 64),
    "permutation": ({"things": 3}, 10),
    "point_cloud": ({"side": 4}, 16),
    "selective_copy": ({"copied": 3, "symbols": 5}, 14),
    "sorting": ({"numbers": 6}, 17),
}


def rows(name: str, count: int = 40, **options):
    fields, length = SMALL[name]
    task = make_task(name, fields)
    settings = {"length": length, "seed": 0, "first": 0, "count": count} | options
    return task, *examples(task, **settings)


def test_every_task_is_tested():
    assert set(SMALL) == set(TASKS.names)


@pytest.mark.parametrize("name", TASKS.names)
def test_ids_are_within_the_vocabulary_and_something_is_asked(name):
    task, tokens, labels = rows(name)
    asked = labels != IGNORED
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.shape == labels.shape == (40, SMALL[name][1])
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < task.vocab_size
    assert bool(asked.any(1).all())
    assert 0 <= int(labels[asked].min()) <= int(labels[asked].max()) < task.vocab_size


@pytest.mark.parametrize("name", TASKS.names)
def test_a_row_follows_from_split_seed_and_index_alone(name):
    _, tokens, labels = rows(name)
    _, again, answers = rows(name, first=7, count=5)
    assert torch.equal(again, tokens[7:12])
    assert torch.equal(answers, labels[7:12])
    assert not torch.equal(rows(name, seed=1)[1], tokens)
    assert not torch.equal(rows(name, split="held_out")[1], tokens)


@pytest.mark.parametrize("name", TASKS.names)
def test_all_answers_occur_about_as_often_as_chance_says(name):
    task, _, labels = rows(name, count=300)
    asked = labels[labels != IGNORED]
    share = asked.bincount(minlength=task.vocab_size).double() / len(asked)
    # ListOps' answers aren't equally likely: MIN and MAX favour 0 and 9.
    slack = 3.5 if name == "listops" else 1.6
    assert int((share > 0).sum()) == round(1 / task.chance)
    assert float(share.max()) < slack * task.chance


def test_mqar_asks_each_key_once_for_its_value():
    task, tokens, labels = rows("mqar")
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        memory = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        asked = {row[place]: answers[place] for place in range(len(row)) if answers[place] != IGNORED}
        assert asked == memory
        assert len(memory) == 4
        assert set(row[8:]) <= {0, *memory}
    assert task.shortest == 16


def test_selective_copy_asks_for_the_symbols_in_order():
    _, tokens, labels = rows("selective_copy")
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert answers[-3:] == [symbol for symbol in row if symbol >= 2]
        assert row[-3:] == [1, 1, 1]
        assert answers[:-3] == [IGNORED] * 11
    assert len({tuple((row >= 2).nonzero()[:, 0].tolist()) for row in tokens}) > 10


def test_parity_counts_the_ones_so_far():
    _, tokens, labels = rows("parity")
    assert torch.equal(labels, tokens.cumsum(1) % 2)


@pytest.mark.parametrize(("things", "moves"), [(3, "all"), (5, "all"), (4, "swaps")])
def test_permutation_gives_the_product_so_far(things, moves):
    task = make_task("permutation", {"things": things, "moves": moves})
    elements = list(permutations(range(things)))
    tokens, labels = examples(task, length=12, seed=0, first=0, count=20)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        # Followed on the things themselves: each move sends what lies at i to its image.
        state = list(range(things))
        for token, answer in zip(row, answers, strict=True):
            state = [elements[token][i] for i in state]
            assert elements[answer] == tuple(state)
    moved = [sum(i != image for i, image in enumerate(elements[token])) for token in tokens.unique()]
    assert set(moved) == ({0, 2} if moves == "swaps" else {0, *range(2, things + 1)})


@pytest.mark.parametrize(("name", "terms"), [("match3", 2), ("match4", 3)])
def test_match_says_whether_numbers_complete_the_query(name, terms):
    task, tokens, labels = rows(name)
    modulus, count = task.config.modulus, task.config.numbers
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert answers[:count] == [IGNORED] * count
        for token, answer in zip(row[count:], answers[count:], strict=True):
            query = token - modulus
            assert 0 <= query < modulus
            matched = any((query + sum(some)) % modulus == 0 for some in product(row[:count], repeat=terms))
            assert answer == 2 * modulus + matched


@pytest.mark.parametrize("scratch", [0, 2, 4])
def test_an_inverse_permutation_puts_symbols_where_they_belong(scratch):
    task = make_task("inverse_permutation", {"things": 4, "symbols": 5, "scratch": scratch})
    tokens, labels = examples(task, length=9, seed=0, first=0, count=400)
    known = 0
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        first = 9 - 4 - scratch
        places, symbols = zip(*(divmod(token - 1, 5) for token in row[first : first + 4]), strict=True)
        assert sorted(places) == [0, 1, 2, 3]
        assert row[:first] + row[first + 4 :] == [0] * (9 - 4)
        assert answers[: first + scratch] == [IGNORED] * (first + scratch)
        asked = answers[first + scratch :]
        assert [asked[place] - 1 - 20 for place in places] == list(symbols)
        known += sum(places.index(place) <= place + scratch for place in range(4))
    share = known / 1600
    # What one who has read so far can know, and guesses of five.
    assert task.ceiling == pytest.approx(share + (1 - share) / 5, abs=0.02)
    assert task.ceiling == {0: 0.7, 2: 0.95, 4: 1.0}[scratch]


def test_sorting_gives_the_numbers_from_the_least_on():
    _, tokens, labels = rows("sorting")
    assert not tokens[:, [0, *range(9, 17)]].any()
    assert (labels[:, :9] == IGNORED).all()
    assert torch.equal(labels[:, 9:], tokens[:, 1:9].sort(1).values)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_points_are_sorted_and_asked_whether_an_earlier_one_touches_them(order):
    task = make_task("point_cloud", {"side": 4, "order": order})
    tokens, labels = examples(task, length=16, seed=0, first=0, count=20)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        points = [(token // 16, token // 4 % 4, token % 4) for token in row]
        assert points == sorted(set(points), key=lambda point: [point[axis] for axis in order])
        for index, point in enumerate(points):
            touched = any(sum(map(abs, np.subtract(point, other))) == 1 for other in points[:index])
            assert answers[index] == 64 + touched


def test_pathfinder_asks_whether_one_path_connects_the_dots():
    _, tokens, labels = rows("pathfinder")
    assert (labels[:, :-1] == IGNORED).all()
    for row, answer in zip(tokens.view(-1, 8, 8).tolist(), labels[:, -1].tolist(), strict=True):
        pixels = {(r, c): row[r][c] for r in range(8) for c in range(8) if row[r][c]}
        dots = [place for place, pixel in pixels.items() if pixel == 2]
        assert (len(pixels), len(dots)) == (8, 2)
        reached, edge = set(), {dots[0]}
        while edge:
            reached |= edge
            edge = {
                (r + a, c + b) for r, c in edge for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))
            } & pixels.keys() - reached
        assert len(reached) == 4
        assert answer == 3 + (dots[1] in reached)


def value_of(tokens: list[str]):
    """The value of a ListOps expression, read from the left; takes its tokens off the list."""
    token = tokens.pop(0)
    if not token.startswith("["):
        return int(token)
    arguments = []
    while tokens[0] != "]":
        arguments.append(value_of(tokens))
    tokens.pop(0)
    rules = {"[MIN": min, "[MAX": max, "[MED": lambda a: int(np.median(a)), "[SM": lambda a: sum(a) % 10}
    return rules[token](arguments)


def test_listops_gives_the_value_of_its_expression():
    _, tokens, labels = rows("listops", count=200)
    names = ["", "]", "[MIN", "[MAX", "[MED", "[SM", *map(str, range(10))]
    depths, most = set(), 0
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        words = [names[token] for token in row if token]
        assert row[: len(row) - len(words)] == [0] * (len(row) - len(words))
        opened = [word.startswith("[") for word in words]
        depths.add(sum(opened))
        most = max(most, len(words))
        assert value_of(words) == answers[-1] - 6
        assert words == []
    assert most > 15
    assert {1, 2, 3} <= depths


def test_induction_asks_what_followed_the_mark():
    _, tokens, labels = rows("induction")
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row.count(5) == 2
        assert row[-1] == 5
        assert answers[-1] == row[row.index(5) + 1]
        assert answers[:-1] == [IGNORED] * 11


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mqar", {"pairs": 200}, "data.task.pairs=200: a row can't have more different keys than data.task.keys=128"),
        ("mqar", {"pair": 2}, "config key 'data.task.pair' is unknown; did you mean 'data.task.pairs'?"),
        ("mqar", {"pairs": 0}, "data.task.pairs=0: must be greater than 0"),
        ("permutation", {"moves": "swap"}, "data.task.moves=swap: must be 'all' or 'swaps'; did you mean 'swaps'?"),
        ("mqra", {}, "data.source 'mqra' is unknown; did you mean 'mqar'?"),
        ("match3", {"modulus": 21, "numbers": 6}, "data.task.numbers=6: all sums could occur among its 21 of 2; these"),
        ("match4", {"modulus": 20, "numbers": 4}, "data.task.numbers=4: all sums could occur among its 20 of 3; these"),
        ("point_cloud", {"order": [0, 1, 1]}, "data.task.order=(0, 1, 1): must name the axes 0, 1 and 2, each once"),
    ],
)
def test_wrong_fields_are_named(name, fields, message):
    with refused(message):
        make_task(name, fields)


def test_a_grid_more_than_half_full_is_refused():
    with pytest.raises(ConfigError, match=r"^data\.task\.side=4: a grid of 64 points is half full with 32"):
        rows("point_cloud", length=33)


def test_a_row_too_short_is_refused():
    with pytest.raises(ConfigError, match=r"^train\.sequence_length=15: data\.source=mqar .* at least 16 tokens"):
        rows("mqar", length=15)


def batches(**options):
    settings = {"split": "train", "seed": 3, "sequence_length": 10, "batch_size": 6} | options
    return SyntheticBatches(make_task("parity"), **settings)


def test_a_batch_is_rows_end_to_end_each_a_document():
    batch = batches().at(2)
    tokens, labels = examples(make_task("parity"), length=10, seed=3, first=12, count=6)
    assert torch.equal(batch.tokens, tokens.view(1, -1))
    assert torch.equal(batch.labels, labels.view(1, -1))
    assert batch.cu_seqlens.tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert batch.offsets == (0, 60)
    assert batches().text_bytes(batch) == 0


def test_ranks_micro_batches_and_parts_share_one_batch():
    whole = batches().at(1)
    pieces = [
        batches().at(1, BatchSlice(rank=rank, ranks=3, micro_batch=micro, micro_batches=2))
        for micro in range(2)
        for rank in range(3)
    ]
    assert torch.equal(torch.cat([piece.tokens for piece in pieces], 1), whole.tokens)
    parts = [batches().at(1, BatchSlice(part=part, parts=4)) for part in range(4)]
    assert torch.equal(torch.cat([part.labels for part in parts], 1), whole.labels)
    assert {part.offsets for part in parts} == {(0, 15, 30, 45, 60)}


def test_held_out_rows_end():
    held_out = batches(split="held_out", seed=0, rows=8)
    assert len(held_out) == 2
    assert sum(held_out.at(index).label_count for index in range(2)) == 80
    assert held_out.at(1).label_count == 20


def test_digits_are_images_of_either_split():
    _, tokens, labels = rows("digits", count=400)
    assert not tokens[:, :6].any()
    _, held_out, _ = rows("digits", count=400, split="held_out")
    assert not {*map(tuple, tokens.tolist())} & {*map(tuple, held_out.tolist())}
    from sklearn.datasets import load_digits

    every_fifth = {*map(tuple, load_digits().data[::5].astype(int).tolist())}
    assert {*map(tuple, held_out[:, 6:].tolist())} <= every_fifth
    assert {int(label) for label in labels[:, -1]} == set(range(17, 27))
