"""A delay is indexing; across pieces, rows and documents it is still the same indexing."""

import pytest
import torch

from seqtrain.kernels import delay
from seqtrain.testing import boundaries


def shifted(x, by):
    return torch.cat([torch.zeros_like(x[:, :by]), x], 1)[:, : x.shape[1]]


@pytest.mark.parametrize("by", [0, 1, 5, 40])
def test_whole_rows_pieces_and_gradient(by):
    x = torch.randn(2, 17, 3, 2, dtype=torch.float64, requires_grad=True)
    whole, state = delay(x, by=by)
    assert torch.equal(whole, shifted(x, by))
    assert torch.equal(state, torch.cat([x.new_zeros(2, by, 3, 2), x], 1)[:, 17:])
    outs, past = [], None
    for piece in x.split([1, 0, 3, 13], 1):
        out, past = delay(piece, by=by, initial_state=past)
        outs.append(out)
    assert torch.equal(torch.cat(outs, 1), whole)
    assert torch.equal(past, state)
    if by:
        (gradient,) = torch.autograd.grad((state * 2).sum() + whole.sum(), x)
        late = torch.arange(17) >= 17 - by
        assert torch.equal(gradient[0, :, 0, 0], 2.0 * late + 1.0 * (torch.arange(17) < 17 - by))


def test_documents_have_their_own_pasts():
    first, second = [4, 1, 7], [2, 0, 9]
    x, y = torch.randn(1, 12, 2), torch.randn(1, 11, 2)
    _, state = delay(x, by=3, cu_seqlens=boundaries(first))
    out, _ = delay(y, by=3, initial_state=state, cu_seqlens=boundaries(second))
    pairs = zip(x.split(first, 1), y.split(second, 1), strict=True)
    expected = [shifted(torch.cat(pair, 1), 3)[:, pair[0].shape[1] :] for pair in pairs]
    assert torch.equal(out, torch.cat(expected, 1))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="by=-1, expected 0"):
        delay(torch.zeros(1, 2), by=-1)
    with pytest.raises(ValueError, match="initial_state has shape"):
        delay(torch.zeros(1, 2), by=1, initial_state=torch.zeros(1, 2))
