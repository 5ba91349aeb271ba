"""Kronecker attention of order 3 and 4: its polynomial against the softmax over all tuples of tokens."""

import pytest
import torch

from seqtrain.kernels import kronecker_attention, tensor_attention
from seqtrain.kernels.kronecker_attention import read_sums, sums_of
from seqtrain.testing import boundaries, relative_error


def tensors(tokens, keys, size=0.5):
    generator = torch.Generator().manual_seed(keys)
    q = size * (2 * torch.rand(1, tokens, 2, 3, generator=generator, dtype=torch.float64) - 1)
    k = size * (2 * torch.rand(1, tokens, 2, keys, 3, generator=generator, dtype=torch.float64) - 1)
    return q, k, torch.randn(1, tokens, 2, keys, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_the_exact_form_weighs_all_tuples_of_tokens_before(keys):
    q, k, v = tensors(5, keys, size=2.0)
    out, _ = kronecker_attention(q, k, v, degree=None, scale=0.7)
    for t in range(5):
        total, weight = 0.0, 0.0
        for tuple_ in torch.cartesian_prod(*keys * [torch.arange(t + 1)]).view(-1, keys):
            each = range(keys)
            score = q[0, t] * torch.stack([k[0, tuple_[r], :, r] for r in each]).prod(0)
            p = (0.7 * score.sum(-1)).exp()[:, None]
            total = total + p * torch.stack([v[0, tuple_[r], :, r] for r in each]).prod(0)
            weight = weight + p
        torch.testing.assert_close(out[0, t], total / weight)


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_a_higher_degree_comes_closer(keys):
    given = tensors(9, keys, size=1.0)
    exact, _ = kronecker_attention(*given, degree=None, scale=1.0)
    errors = [relative_error(kronecker_attention(*given, degree=degree, scale=1.0)[0], exact) for degree in (2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-4


def test_order_three_is_tensor_attention():
    q, k, v = tensors(70, 2)
    packed = {"cu_seqlens": boundaries([20, 0, 50])}
    came = kronecker_attention(q, k, v, degree=4, scale=0.6, backend="reference", **packed)
    expected = tensor_attention(q, *k.unbind(3), *v.unbind(3), degree=4, scale=0.6, backend="reference", **packed)
    for one, other in zip(came, expected, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("keys", [2, 3])
def test_sums_over_a_document_are_attention_without_order(keys):
    q, k, v = tensors(8, keys, size=1.0)
    exact, _ = kronecker_attention(q, k, v, degree=None, scale=0.5, causal=False)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled, _ = kronecker_attention(q, k[:, order], v[:, order], degree=None, scale=0.5, causal=False)
    torch.testing.assert_close(shuffled, exact)
    assert relative_error(read_sums(q, sums_of(k, v, 6), 6, 0.5), exact) < 1e-5
    # The last token of the causal form sees all.
    causal, _ = kronecker_attention(q, k, v, degree=None, scale=0.5)
    torch.testing.assert_close(causal[:, -1], exact[:, -1])


def test_what_can_t_be():
    given = tensors(4, 3)
    with pytest.raises(ValueError, match="degree=3, expected an even number"):
        kronecker_attention(*given, degree=3)
    with pytest.raises(ValueError, match="causal=False is there for degree=None"):
        kronecker_attention(*given, causal=False)
    with pytest.raises(ValueError, match="initial_state given with degree=None"):
        kronecker_attention(*given, degree=None, initial_state=torch.zeros(1))
