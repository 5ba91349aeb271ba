"""What a sequence tells an operator: held whole, in groups that know nothing of each other, continued from before."""

from itertools import pairwise

import pytest
import torch

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.parallel import ContinuedSequence, SequenceContext
from seqtrain.testing import boundaries, relative_error

CPU = torch.device("cpu")
SIZE = 4
both = pytest.mark.parametrize("operator", [linear_attention, softmax_attention], ids=lambda f: f.__name__)


def test_positions_restart_with_each_document():
    edges = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert SequenceContext(edges).positions(7, edges.device).tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert SequenceContext().positions(4, edges.device).tolist() == [0, 1, 2, 3]


def test_an_operator_gets_what_the_sequence_knows():
    def operator(x, *, power, initial_state, cu_seqlens, backend):
        return x**power, (initial_state, cu_seqlens, backend)

    edges = torch.tensor([0, 2])
    out, came = SequenceContext(edges, backend="chunked").run(
        operator, torch.full((1, 2), 3.0), power=2, initial_state="past"
    )
    assert out.tolist() == [[9.0, 9.0]]
    assert came == ("past", edges, "chunked")


def test_counts_continue_from_earlier_calls():
    rows = SequenceContext()
    before, after = rows.count(None, 2, 4, torch.device("cpu"))
    assert (before + rows.positions(4, before.device)).tolist() == [[0, 1, 2, 3]]
    before, after = rows.count(after + torch.tensor([0, 5]), 2, 3, before.device)
    assert (before + rows.positions(3, before.device)).tolist() == [[4, 5, 6], [9, 10, 11]]
    assert after.tolist() == [7, 12]
    packed = SequenceContext(torch.tensor([0, 2, 5]))
    before, after = packed.count(torch.tensor([10, 20]), 1, 5, before.device)
    assert (before + packed.positions(5, before.device)).tolist() == [[10, 11, 20, 21, 22]]
    assert after.tolist() == [12, 23]


def test_reversing_turns_every_row_or_document():
    x = torch.arange(12).view(2, 6)
    assert SequenceContext().reverse(x).tolist() == [[5, 4, 3, 2, 1, 0], [11, 10, 9, 8, 7, 6]]
    packed = SequenceContext(torch.tensor([0, 2, 2, 5, 6]))
    assert packed.reverse(x[:1, :, None])[0, :, 0].tolist() == [1, 0, 4, 3, 2, 5]


def tensors(batch: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, 2, 3, dtype=torch.float64, generator=generator) for _ in range(3)]


def group_by_group(operator, inputs, edges) -> torch.Tensor:
    """The definition: the operator on each group alone, groups counted from each document's start."""
    outs = []
    for start, end in pairwise(edges):
        for first in range(start, end, SIZE):
            rows = slice(first, min(first + SIZE, end))
            outs.append(operator(*(x[:, rows] for x in inputs))[0])
    return torch.cat(outs, 1)


@both
def test_groups_of_documents_in_parts(operator):
    """Two documents of which the second call brings more tokens; one of them stands at a boundary of groups."""
    lengths = ([4, 6], [5, 0], [2, 3])
    inputs = [tensors(1, sum(tokens)) for tokens in lengths]
    state, past, outs = None, None, []
    for tokens, parts in zip(lengths, inputs, strict=True):
        sequence = SequenceContext(torch.tensor([0, tokens[0], sum(tokens)]))
        out, state = sequence.grouped(SIZE, past).run(operator, *parts, initial_state=state)
        _, past = sequence.count(past, 1, sum(tokens), out.device)
        outs.append(out.split(tokens, 1))
    for document in (0, 1):
        parts = [
            torch.cat([x[which].split(tokens, 1)[document] for tokens, x in zip(lengths, inputs, strict=True)], 1)
            for which in range(3)
        ]
        expected = group_by_group(operator, parts, [0, sum(tokens[document] for tokens in lengths)])
        torch.testing.assert_close(torch.cat([out[document] for out in outs], 1), expected)


def continued(*lengths):
    return ContinuedSequence.of(SequenceContext(boundaries(lengths)))


@pytest.mark.parametrize(("operator", "options"), [(linear_attention, {}), (softmax_attention, {"window": 5})])
def test_a_state_is_the_first_documents_and_the_one_that_comes_back_the_lasts(operator, options):
    before, after_it = tensors(1, 9, seed=1), tensors(1, 20)
    _, past = SequenceContext(boundaries([9])).run(operator, *before, **options)
    out, after = continued(6, 11, 3).run(operator, *after_it, initial_state=past, **options)
    own = SequenceContext(boundaries([9 + 6, 11, 3]))
    together = [torch.cat(pair, 1) for pair in zip(before, after_it, strict=True)]
    expected, _ = own.run(operator, *together, **options)
    assert relative_error(out, expected[:, 9:]) < 1e-12
    _, last = SequenceContext(boundaries([3])).run(operator, *(tensor[:, -3:] for tensor in after_it), **options)
    last, after = ({"state": x} if isinstance(x, torch.Tensor) else x for x in (last, after))
    assert after.keys() == last.keys()
    for name, state in last.items():
        assert relative_error(after[name], state) < 1e-12


def test_positions_continue_in_the_first_document_alone():
    sequence = continued(3, 2)
    before, after = sequence.count(torch.tensor([100]), 1, 5, CPU)
    assert (sequence.positions(5, CPU) + before)[0].tolist() == [100, 101, 102, 0, 1]
    assert after.tolist() == [2]
    before, after = continued(5).count(torch.tensor([100]), 1, 5, CPU)
    assert after.tolist() == [105]
    before, after = sequence.count(None, 1, 5, CPU)
    assert (before + 0 * after).tolist() == [[0]]


def test_a_state_of_another_document_counts_for_nothing():
    inputs = tensors(1, 9)
    _, past = SequenceContext(boundaries([9])).run(linear_attention, *tensors(1, 9, seed=1))
    past = past.detach().requires_grad_()
    other = ContinuedSequence.of(SequenceContext(boundaries([6, 3])), continues=False)
    expected, _ = continued(6, 3).run(linear_attention, *inputs)
    out, _ = other.repeated(1).run(linear_attention, *inputs, initial_state=past)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert torch.equal(past.grad, torch.zeros_like(past)), "there is one all the same"
    before, after = other.count(torch.tensor([100]), 1, 9, CPU)
    assert (int(before.max()), after.tolist()) == (0, [3])


def test_a_token_repeated_keeps_its_document():
    assert SequenceContext(torch.tensor([0, 3, 7])).repeated(2).cu_seqlens.tolist() == [0, 6, 14]
    assert SequenceContext().repeated(2) == SequenceContext()
    assert continued(3, 2).repeated(2).cu_seqlens.tolist() == [0, 6, 10]


def test_a_continued_sequence_can_not_be_reversed():
    with pytest.raises(ValueError, match="piece by piece can't be reversed"):
        continued(3, 2).reverse(torch.zeros(1, 5, 1))
