"""Layers, whole models and torch.compile on a GPU: the numbers the CPU gives."""

import pytest
import torch

from seqtrain.parallel.sequence import Sequence
from seqtrain.testing import borders, relative_error
from tests.mixers.test_contract import build, every_mixer, inputs
from tests.models import test_compile

TOKENS = 70
LENGTHS = (20, 0, 49, 1)


def outputs(device, name, fields, sequence):
    """Output, state and gradients of a layer in float32, on the CPU."""
    layer = build(name, fields, dtype=torch.float32).to(device)
    x = inputs(1, TOKENS, torch.float32).to(device).requires_grad_()
    out, state = layer(x, sequence=sequence)
    # Not the sum of squares: layers end in norms, which leave it as it is, and gradients near zero.
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device)
    gradients = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()], allow_unused=True)
    named = zip(["x", *(key for key, _ in layer.named_parameters())], gradients, strict=True)
    found = {"out": out} | {f"state {key}": value for key, value in state.items()}
    found |= {f"grad {key}": x for key, x in named if x is not None}
    return {key: x.detach().cpu() for key, x in found.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["row", "documents"])
@every_mixer
def test_a_layer_is_what_it_is_on_the_cpu(name, fields, packed):
    sequence = Sequence(borders(LENGTHS) if packed else None)
    expected = outputs("cpu", name, fields, sequence)
    came = outputs("cuda", name, fields, sequence)
    errors = {key: relative_error(came[key], expected[key]) for key in expected}
    beyond = {key: f"{error:.1e}" for key, error in errors.items() if not error <= 1e-3}
    assert not beyond, beyond


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_a_compiled_model_is_the_model(packed):
    torch._dynamo.reset()
    model = test_compile.build(test_compile.HYBRID).cuda()
    compiled = torch.compile(model, fullgraph=True)
    tokens, labels = (x.cuda() for x in test_compile.batch(70))
    sequence = Sequence(borders([15, 0, 55]) if packed else None)
    expected, came = (
        test_compile.loss_and_gradients(each, model, tokens, labels, sequence) for each in (model, compiled)
    )
    for name, x, y in zip(["loss", *(key for key, _ in model.named_parameters())], came, expected, strict=True):
        assert relative_error(x, y) < 1e-3, name
