"""A piece of a packed row: the first document goes on from a state, the last one's comes back."""

import pytest
import torch

from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.parallel.sequence import ContinuedSequence, SequenceContext
from seqtrain.testing import boundaries, relative_error

CPU = torch.device("cpu")


def continued(*lengths):
    return ContinuedSequence.of(SequenceContext(boundaries(lengths)))


def inputs(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(("operator", "options"), [(linear_attention, {}), (softmax_attention, {"window": 5})])
def test_a_state_is_the_first_documents_and_the_one_that_comes_back_the_lasts(operator, options):
    before, tensors = inputs(9, 1), inputs(20, 2)
    _, past = SequenceContext(boundaries([9])).run(operator, *before, **options)
    out, after = continued(6, 11, 3).run(operator, *tensors, initial_state=past, **options)
    own = SequenceContext(boundaries([9 + 6, 11, 3]))
    together = [torch.cat(pair, 1) for pair in zip(before, tensors, strict=True)]
    expected, _ = own.run(operator, *together, **options)
    assert relative_error(out, expected[:, 9:]) < 1e-12
    _, last = SequenceContext(boundaries([3])).run(operator, *(tensor[:, -3:] for tensor in tensors), **options)
    last, after = ({"state": x} if isinstance(x, torch.Tensor) else x for x in (last, after))
    assert after.keys() == last.keys()
    for name, state in last.items():
        assert relative_error(after[name], state) < 1e-12


def test_places_go_on_in_the_first_document_alone():
    sequence = continued(3, 2)
    before, after = sequence.count(torch.tensor([100]), 1, 5, CPU)
    assert (sequence.positions(5, CPU) + before)[0].tolist() == [100, 101, 102, 0, 1]
    assert after.tolist() == [2]
    before, after = continued(5).count(torch.tensor([100]), 1, 5, CPU)
    assert after.tolist() == [105]
    before, after = sequence.count(None, 1, 5, CPU)
    assert (before + 0 * after).tolist() == [[0]]


def test_tokens_that_stand_many_times():
    assert continued(3, 2).repeated(2).cu_seqlens.tolist() == [0, 6, 10]


def test_it_can_not_be_reversed():
    with pytest.raises(ValueError, match="piece by piece can't be reversed"):
        continued(3, 2).reverse(torch.zeros(1, 5, 1))
