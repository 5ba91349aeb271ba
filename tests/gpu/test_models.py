"""Layers, whole models and torch.compile on a GPU: the numbers the CPU gives."""

import pytest
import torch

from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error
from tests.mixers.test_contract import build, every_mixer, inputs, run
from tests.models import test_compile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TOKENS = 70
LENGTHS = (20, 0, 49, 1)


@pytest.mark.parametrize("packed", [False, True], ids=["row", "documents"])
@every_mixer
def test_a_layer_is_what_it_is_on_the_cpu(name, fields, packed):
    documents = {"cu_seqlens": boundaries(LENGTHS)} if packed else {}

    def on(device, dtype):
        layer, x = build(name, fields, dtype=torch.float32).to(dtype), inputs(1, TOKENS, torch.float32).to(dtype)
        return {key: value.cpu() for key, value in run(layer.to(device), x.to(device), **documents).items()}

    exact, rounded, came = on("cpu", torch.float64), on("cpu", torch.float32), on("cuda", torch.float32)
    for key, expected in exact.items():
        # What is a small difference of large numbers is as wrong on the CPU.
        limit = max(1e-3, 4 * relative_error(rounded[key], expected))
        assert relative_error(came[key], expected) <= limit, key


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_a_compiled_model_is_the_model(packed):
    torch._dynamo.reset()
    model = test_compile.build(test_compile.HYBRID).cuda()
    compiled = torch.compile(model, fullgraph=True)
    tokens, labels = (x.cuda() for x in test_compile.batch(70))
    sequence = SequenceContext(boundaries([15, 0, 55]) if packed else None)
    expected, came = (
        test_compile.loss_and_gradients(each, model, tokens, labels, sequence) for each in (model, compiled)
    )
    for name, x, y in zip(["loss", *(key for key, _ in model.named_parameters())], came, expected, strict=True):
        assert relative_error(x, y) < 1e-3, name
