"""A whole language model as one graph of torch.compile: the same loss and gradients, with documents and without."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error
from tests.models.tiny import batch, build

# One mixer of each operator, and groups of tokens.
HYBRID = ("gated_delta_net", "gla", "s5", "s4d", "tensor_attention", "sliding_attention", "trans_normer", "ttt_linear")
pytestmark = pytest.mark.all


def loss_and_gradients(run, model, tokens, labels, sequence):
    loss = run(tokens, labels, sequence=sequence)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same(model, compiled, sequence, limit=1e-5, *, tokens=40):
    read = batch(tokens, rows=1)
    expected = loss_and_gradients(model, model, *read, sequence)
    came = loss_and_gradients(compiled, model, *read, sequence)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, x, y in zip(names, came, expected, strict=True):
        assert relative_error(x, y) < limit, name


@pytest.fixture
def compiler():
    """Compiles a model as one graph; `graphs` lists those made."""
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    yield lambda model: torch.compile(model, fullgraph=True, backend=counted), graphs
    torch._dynamo.reset()


LENGTHS = ([15, 0, 25], [1, 20, 3, 16], [10, 10, 10, 5, 5])


def test_packed_documents_of_any_number(compiler):
    compile_, graphs = compiler
    model = build(HYBRID, width=32)
    compiled = compile_(model)
    for lengths in LENGTHS:
        edges = boundaries(lengths)
        torch._dynamo.mark_dynamic(edges, 0)  # as it is from the second number on: one graph less to make
        assert_same(model, compiled, SequenceContext(edges))
    assert len(graphs) == 1


@pytest.mark.full
def test_recomputed_blocks_and_a_number_of_documents_that_changes(compiler):
    compile_, graphs = compiler
    model = build(("gated_delta_net", "s5"), width=32, activation_checkpointing=True)
    compiled = compile_(model)
    for lengths in LENGTHS:
        assert_same(model, compiled, SequenceContext(boundaries(lengths)))
    # One for the first number of documents, one for all others.
    assert len(graphs) == 2


@pytest.mark.full
def test_rows_without_documents(compiler):
    compile_, graphs = compiler
    model = build(HYBRID, width=32)
    assert_same(model, compile_(model), SequenceContext())
    assert len(graphs) == 1


def test_under_autocast(compiler):
    model = build(("gated_delta_net", "attention"), width=32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, compiler[0](model), SequenceContext(boundaries([15, 25])), 1e-2)


@pytest.mark.full
@pytest.mark.parametrize("packed", [False, True])
def test_inductor(packed):
    torch._dynamo.reset()
    model = build(HYBRID, width=32)
    sequence = SequenceContext(boundaries([15, 0, 25]) if packed else None)
    assert_same(model, torch.compile(model, fullgraph=True), sequence)
