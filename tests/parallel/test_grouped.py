"""Groups of tokens know nothing of each other, wherever calls begin and end."""

from itertools import pairwise

import pytest
import torch

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.parallel.sequence import SequenceContext

SIZE = 4


def tensors(batch: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, 2, 3, dtype=torch.float64, generator=generator) for _ in range(3)]


def group_by_group(operator, inputs, boundaries) -> torch.Tensor:
    """The definition: the operator on each group alone, groups counted from each document's start."""
    outs = []
    for start, end in pairwise(boundaries):
        for first in range(start, end, SIZE):
            rows = slice(first, min(first + SIZE, end))
            outs.append(operator(*(x[:, rows] for x in inputs))[0])
    return torch.cat(outs, 1)


@pytest.mark.parametrize("operator", [linear_attention, softmax_attention], ids=lambda f: f.__name__)
def test_packed_documents(operator):
    inputs, boundaries = tensors(1, 19), [0, 6, 6, 14, 19]
    out, _ = SequenceContext(torch.tensor(boundaries)).grouped(SIZE).run(operator, *inputs)
    torch.testing.assert_close(out, group_by_group(operator, inputs, boundaries))


@pytest.mark.parametrize("operator", [linear_attention, softmax_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("pieces", [(0, 3, 4, 5, 11), (0, 4, 8, 11), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)])
def test_rows_in_pieces(operator, pieces):
    inputs = tensors(2, 11)
    sequence, state, past, outs = SequenceContext(), None, None, []
    for start, end in pairwise(pieces):
        parts = [x[:, start:end] for x in inputs]
        out, state = sequence.grouped(SIZE, past).run(operator, *parts, initial_state=state)
        _, past = sequence.count(past, 2, end - start, out.device)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), group_by_group(operator, inputs, [0, 11]))


@pytest.mark.parametrize("operator", [linear_attention, softmax_attention], ids=lambda f: f.__name__)
def test_documents_in_pieces(operator):
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
