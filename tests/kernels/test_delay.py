"""A delay is indexing."""

import pytest
import torch

from seqtrain.kernels import delay


def shifted(x, by):
    return torch.cat([torch.zeros_like(x[:, :by]), x], 1)[:, : x.shape[1]]


@pytest.mark.parametrize("by", [0, 1, 5, 40])
def test_whole_rows_and_gradient(by):
    x = torch.randn(2, 17, 3, 2, dtype=torch.float64, requires_grad=True)
    whole, state = delay(x, by=by)
    assert torch.equal(whole, shifted(x, by))
    assert torch.equal(state, torch.cat([x.new_zeros(2, by, 3, 2), x], 1)[:, 17:])
    if by:
        (gradient,) = torch.autograd.grad((state * 2).sum() + whole.sum(), x)
        late = torch.arange(17) >= 17 - by
        assert torch.equal(gradient[0, :, 0, 0], 2.0 * late + 1.0 * (torch.arange(17) < 17 - by))


def test_a_negative_delay_is_refused():
    with pytest.raises(ValueError, match="by=-1, expected 0"):
        delay(torch.zeros(1, 2), by=-1)
