"""The Hessian's figures, against matrices that are known and Hessians that autograd forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.sharpness import hessian_product, hutchinson, largest_eigenvalue

LIMITS = {"iterations": 40, "tolerance": 1e-9}


def drawn(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_of_a_quadratic_they_are_those_of_its_matrix():
    matrix = drawn(12, 12)
    matrix = matrix + matrix.T - 3 * torch.eye(12)
    weights = [nn.Parameter(drawn(3, 2)), nn.Parameter(drawn(6))]
    product = hessian_product(lambda: (x := torch.cat([w.flatten() for w in weights])) @ matrix @ x / 2, weights)
    assert torch.allclose(product(drawn(12)), matrix @ drawn(12), rtol=1e-8)
    found, products = largest_eigenvalue(product, drawn(12), **LIMITS)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] < -values[-1], "of the two ends, the largest and not the one farther from 0"
    assert found == pytest.approx(float(values[-1]), rel=1e-6)
    assert products <= 12
    trace, error = hutchinson(product, 12, samples=400, generator=torch.Generator().manual_seed(0))
    assert abs(trace - float(matrix.trace())) < 3 * error
    # The variance of a sample is twice the sum of squares beside the diagonal.
    beside = matrix - torch.diag(matrix.diag())
    assert error == pytest.approx(float((2 * beside.square().sum() / 400).sqrt()), rel=0.15)


@pytest.mark.parametrize("mixer", ["linear_attention", "attention"])
def test_of_a_language_model_it_is_autograds(mixer):
    """Through the operators' own backward passes, and twice through the definitions'."""
    torch.manual_seed(0)
    config = ModelConfig(layers=(mixer,), depth=1, width=8, heads=2)
    model = LanguageModel(config, {mixer: MIXERS.get(mixer).Config()}, 11).double()
    tokens, labels = torch.randint(11, (2, 1, 9)).unbind()
    weights = list(model.parameters())
    product = hessian_product(lambda: model(tokens, labels), weights)
    vector = drawn(sum(weight.numel() for weight in weights))
    logits, _ = model(tokens, sequence=SequenceContext(backend="reference"), all_logits=True)
    loss = F.cross_entropy(logits[0], labels[0], reduction="sum")
    first = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(first @ vector, weights)])
    assert (product(vector) - expected).norm() < 1e-5 * expected.norm()
