"""Windows with sinks on a sharded row: outputs, states and every gradient are those of the whole row."""

import itertools

import pytest
import torch

from seqtrain.kernels import sink_attention
from seqtrain.parallel import relay
from tests.parallel.shard_cases import CUTS, Cut, OperatorCase, assert_nothing_leaks, assert_same_as_whole

HEADS, GROUPS, KEY, VALUE = 4, 2, 6, 5
# Windows and sinks, each shorter and longer than some rank's tokens.
REACHES = [(1, 3), (90, 7), (20, 0), (3, 80)]


def sink_cases(cut, *, lengths=None, batch=1, reaches=REACHES):
    """Every reach on a row; `lengths`: how many tokens came before each row of the batch."""
    generator = torch.Generator().manual_seed(0)

    def normal(tokens, *shape, batch=batch):
        return torch.randn(batch, tokens, *shape, generator=generator, dtype=torch.float64)

    def past(**reach):
        shapes = (HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE)
        rows = ([normal(tokens, *shape, batch=1) for shape in shapes] for tokens in lengths)
        states = [sink_attention(*row, **reach)[1] for row in rows]
        return {key: torch.cat([state[key] for state in states]) for key in states[0]}

    shapes = {"q": (HEADS, KEY), "k": (GROUPS, KEY), "v": (GROUPS, VALUE)}
    shapes |= {"extra_score": (HEADS,), "extra_value": (HEADS, VALUE)}
    tensors = {name: normal(cut.tokens, *shape) for name, shape in shapes.items()}
    cases = {}
    for window, sinks in reaches:
        reach = {"window": window, "sinks": sinks}
        cases[f"{window} {sinks}"] = OperatorCase(sink_attention, tensors, reach, past(**reach) if lengths else None)
    return cases


def agree(cut, lengths, *, batch=1):
    assert_same_as_whole(sink_cases(cut, lengths=lengths, batch=batch), cut, limit=1e-11)


MORE = [*itertools.product(CUTS, [None]), *itertools.product(["one document", "empty ranks", "few tokens"], [2])]
MORE += [("across three ranks", 40), ("empty ranks", 40), ("one document", 0)]


@pytest.mark.parametrize(
    ("cut", "before"), [("uneven", 2), *(pytest.param(*case, marks=pytest.mark.all) for case in MORE)]
)
def test_a_sharded_row_gives_what_the_whole_one_gives(cut, before):
    agree(CUTS[cut], None if before is None else [before])


@pytest.mark.all
@pytest.mark.parametrize("lengths", [None, [1, 30]])
def test_rows_of_a_batch_have_sinks_of_their_own(lengths):
    """With pasts of different lengths their sinks fill up at different tokens."""
    agree(Cut((0, 1, 4, 31), None), lengths, batch=2)


@pytest.mark.all
def test_ranks_do_not_wait_for_each_other(monkeypatch):
    """The operator runs at once on every rank: its state is not handed on."""

    def refuse(*unused):
        raise AssertionError("relayed")

    monkeypatch.setattr("seqtrain.parallel.relay._pass_on", refuse)
    monkeypatch.setattr(relay, "_receive", refuse)
    agree(CUTS["one document"], None)


@pytest.mark.all
def test_nothing_leaks_into_the_next_document():
    cut = Cut((0, 20, 43, 60), (0, 25, 60))
    assert_nothing_leaks(sink_cases(cut, reaches=[(6, 30)]), cut, 24)
