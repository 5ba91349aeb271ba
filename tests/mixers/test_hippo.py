"""HiPPO-LegS: its matrices and its perturbation."""

import math

import pytest
import torch

from seqtrain.mixers.common.hippo import hippo_legs, perturbed_legs
from seqtrain.testing import relative_error


def test_hippo_is_the_published_matrix():
    a, b = hippo_legs(4)
    for n in range(4):
        assert b[n] == math.sqrt(2 * n + 1)
        for k in range(4):
            expected = math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else n + 1 if n == k else 0
            assert a[n, k].item() == pytest.approx(-expected)


@pytest.mark.parametrize("size", [2, 8, 64, 96])
def test_a_perturbed_hippo_is_diagonalized(size):
    found = perturbed_legs(size, 10.0)
    rank_one = (torch.arange(size, dtype=torch.float64) + 0.5).sqrt()
    error = found.share * rank_one[:, None] * rank_one
    rebuilt = 2 * ((found.vectors * found.values) @ found.inverse).real
    assert relative_error(rebuilt, hippo_legs(size)[0] + error) < 1e-11
    assert found.size == pytest.approx(torch.linalg.matrix_norm(error, 2).item())
    vectors = torch.cat([found.vectors, found.vectors.conj()], 1)
    assert found.condition == pytest.approx(torch.linalg.cond(vectors).item(), rel=1e-6)
    assert (found.values.real < 0).all()
    assert (found.values.imag > 0).all()


def test_the_tradeoff_is_between_size_and_condition():
    found = [perturbed_legs(32, tradeoff) for tradeoff in (1.0, 10.0, 100.0)]
    assert found[0].size > found[1].size > found[2].size
    assert found[0].condition < found[1].condition < found[2].condition
    # Without a perturbation the condition number has no use; a small one gives hundreds.
    assert torch.linalg.cond(torch.linalg.eig(hippo_legs(32)[0])[1]) > 1e12
    assert found[1].condition < 200
    assert found[1].size < 0.02 * torch.linalg.matrix_norm(hippo_legs(32)[0], 2)
