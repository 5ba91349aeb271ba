"""Who does what of softmax attention over ranks: every pair of a query and a key once, about as many on every rank."""

import random
from itertools import pairwise

import pytest

from seqtrain.parallel.attention_layout import COSTS, Heads, balanced, cheapest, contiguous

HEADS = Heads(8, 4, 64, 64, 2)


def even(tokens, ranks):
    return tuple(tokens * rank // ranks for rank in range(ranks + 1))


def most(layout):
    """Pairs of the group that has most, as a share of the mean."""
    return max(layout.pairs) * layout.outer / sum(layout.pairs)


def test_every_rank_has_the_same_work():
    for ranks in (2, 3, 8, 60, 200, 1024):
        tokens = 128 * ranks + 37
        layout = balanced(even(tokens, ranks), (0, tokens), 1)
        assert sum(layout.pairs) == tokens * (tokens + 1) // 2
        assert most(layout) <= 1.05, ranks
        # By blocks of a contiguous cut the last rank has nearly twice the mean.
        assert most(contiguous(even(tokens, ranks), (0, tokens), 1)) == pytest.approx(2 - 1 / ranks, rel=0.01)


@pytest.mark.parametrize("longest", [20_000, 200_000])
def test_documents_of_any_length_are_balanced(longest):
    draw, boundaries = random.Random(0), [0]
    while boundaries[-1] < 1 << 20:
        boundaries.append(boundaries[-1] + draw.randint(1, longest))
    for ranks in (2, 8, 32):
        layout = balanced(even(boundaries[-1], ranks), tuple(boundaries), 1)
        assert sum(layout.pairs) == sum(n * (n + 1) // 2 for n in (b - a for a, b in pairwise(boundaries)))
        assert most(layout) <= 1.05


def seen_pairs(layout, ends):
    """All pairs of a query and a key that groups compute, by position, in the order of the rounds."""
    held = [[range(span.start, span.end) for span in spans] for spans in layout.shared]
    positions = [[p for span in spans for p in span] for spans in held]
    queries = [[p for span in spans for p in range(max(span.start, 0), span.end)] for spans in layout.spans]
    for group in range(layout.outer):
        blocks = [(positions[group], layout.own_work(group))]
        for now in layout.rounds(group):
            source = (group - now.distance) % layout.outer
            block = [p for place in layout.first_block(source) for p in positions[source][place]]
            for distance in range(1, now.distance):
                passing = layout.rounds((source + distance) % layout.outer)[distance - 1]
                block = [p for place in passing.passed for p in block[place]]
            assert len(block) == now.rows
            blocks.append((block, now.work))
        for keys, work in blocks:
            for rows, seen, causal in work:
                for query in queries[group][rows]:
                    yield from ((query, key) for key in keys[seen] if not causal or key <= query)
        for span in layout.spans[group]:
            if not span.shared:
                yield from ((q, k) for q in range(span.start, span.end) for k in range(span.start, q + 1))


@pytest.mark.parametrize("form", [contiguous, balanced])
@pytest.mark.parametrize("given", [0, 3])
def test_each_pair_is_met_once(form, given):
    for offsets in (even(29, 4), (0, 3, 3, 20, 29), (0, 0, 28, 29, 29), (0, 0, 0, 0, 29)):
        for boundaries in ((0, 29), (0, 2, 23, 29), (0, 7, 15, 29), (0, 1, 4, 6, 11, 15, 28, 29)):
            for inner in (1, 2, 4):
                layout = form(offsets, boundaries, inner, given)
                came = sorted(seen_pairs(layout, boundaries))
                documents = [(start - given * (start == 0), start, end) for start, end in pairwise(boundaries)]
                true = [
                    (q, k) for first, start, end in documents for q in range(start, end) for k in range(first, q + 1)
                ]
                assert came == sorted(true), (offsets, boundaries, inner)
                # What a group sends home in a round is what its owner waits for.
                for group in range(layout.outer):
                    for now in layout.rounds(group):
                        owner = layout.rounds((group - now.distance) % layout.outer)[now.distance - 1]
                        rows = [sum(place.stop - place.start for place in each) for each in (now.home, owner.back)]
                        assert rows[0] == rows[1]


def test_auto_takes_the_cheapest():
    costs, million = COSTS["cuda"], 1 << 20
    # As many ranks as key heads: each has its own heads of all tokens.
    assert cheapest(even(million, 4), (0, million), HEADS, costs).inner == 4
    # More ranks: heads inside, a balanced ring of the groups.
    both = cheapest(even(million, 64), (0, million), HEADS, costs)
    assert (both.inner, both.outer) == (4, 16)
    assert most(both) < 1.05
    # Documents that hardly reach to the left: little travels, nothing leaves its rank.
    short = cheapest(even(million, 8), (*range(0, million, 1000), million), HEADS, COSTS["cpu"])
    assert (short.inner, short.moves, short.farthest) == (1, False, 1)
