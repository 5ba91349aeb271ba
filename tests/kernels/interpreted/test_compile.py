"""A whole model on Triton's kernels as one graph of torch.compile."""

import torch
from torch._dynamo.backends.debugging import aot_eager

from seqtrain.kernels import dispatch
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries
from tests.models.test_compile import assert_same, build


def test_kernels_are_nodes_of_one_graph(monkeypatch):
    # As on a GPU, for the loss, too, which no sequence tells its backend.
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "chunked"))
    dispatch.reset_backend_choice()
    torch._dynamo.reset()
    # Short convolution, norm and gate, delta rule, diagonal scan, tensor attention, cross-entropy.
    model = build(("gated_delta_net", "rg_lru", "tensor_attention"))
    compiled = torch.compile(model, fullgraph=True, backend=aot_eager)
    assert_same(model, compiled, SequenceContext(boundaries([5, 0, 12])), tokens=17)
    torch._dynamo.reset()
    dispatch.reset_backend_choice()
