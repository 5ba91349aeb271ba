"""softmax_attention: SDPA on pieces against one masked softmax in float64: windows, documents, pasts, grouped heads."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.kernels import softmax_attention
from seqtrain.kernels.softmax_attention import chunked
from seqtrain.planning.trace import Tracer
from seqtrain.testing import TOLERANCES, boundaries, relative_error
from tests.kernels.contract_cases import Case, assert_equal, cast, run

H, G, K, V = 4, 2, 8, 5
LENGTHS = [0, 0, 1, 3, 0, 30, 27, 0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)


def case(tokens, *, documents=False, window=None, past=True, values=V):
    """Tensors by name, and a state of uneven lengths."""
    rows = 7 if window is None else window - 1
    if documents:
        lengths = [rows, 0, rows // 2, 0, rows, rows, 1 if rows else 0, 0]
        batch, kept = 1, sum(lengths)
    else:
        batch, kept, lengths = 2, rows, [rows, rows // 2]
    tensors = {
        "q": normal(batch, tokens, H, K),
        "k": normal(batch, tokens, G, K, seed=1),
        "v": normal(batch, tokens, G, values, seed=2),
    }
    if not past:
        return tensors, None
    k, v = normal(batch, kept, G, K, seed=3), normal(batch, kept, G, values, seed=4)
    return tensors, {"k": k, "v": v, "length": torch.tensor(lengths)}


def assert_equals_the_definition(tensors, state, cu_seqlens=None, **options):
    call = Case(softmax_attention, options)
    tensors, state = ({name: cast(x, torch.float32) for name, x in (each or {}).items()} for each in (tensors, state))
    came = run(call, tensors, state or None, backend="chunked", cu_seqlens=cu_seqlens)
    tensors, state = ({name: cast(x, torch.float64) for name, x in each.items()} for each in (tensors, state))
    expected = run(call, tensors, state or None, backend="reference", cu_seqlens=cu_seqlens)
    assert_equal(came, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("past", [False, True], ids=["fresh", "past"])
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
def test_chunked_equals_the_definition(window, documents, past):
    tensors, state = case(61, documents=documents, window=window, past=past)
    cu_seqlens = boundaries(LENGTHS) if documents else None
    assert_equals_the_definition(tensors, state, window=window, cu_seqlens=cu_seqlens)


def test_long_documents_next_to_short_ones():
    tensors, _ = case(1300, documents=True, past=False)
    assert_equals_the_definition(tensors, None, cu_seqlens=boundaries([3, 1100, 2, 150, 40, 5]))


@pytest.mark.parametrize("values", [K, 2 * K])
def test_wide_values_and_a_scale(values):
    assert_equals_the_definition(*case(40, values=values), scale=0.3)


def test_the_definition_is_softmax_attention():
    q, k, v = case(20, past=False)[0].values()
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(H // G, 2).transpose(1, 2),
        v.repeat_interleave(H // G, 2).transpose(1, 2),
        is_causal=True,
    )
    out, state = softmax_attention(q, k, v, backend="reference")
    assert relative_error(out, expected.transpose(1, 2)) < 1e-14
    assert torch.equal(state["k"], k)
    out, _ = softmax_attention(q, k, v, window=1, backend="reference")
    assert torch.allclose(out, v.repeat_interleave(H // G, 2))


def test_a_window_holds_no_mask_that_grows_with_the_tokens():
    q = torch.randn(1, 4096, 1, 8, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.untyped_storage().size()) or x, lambda x: x):
        softmax_attention(q, q, q, window=64, backend="chunked")
    assert sizes
    # The inputs, and masks of 64 x 128: a mask over all keys would have 16 million entries, one a block 512 thousand.
    assert max(sizes) <= 4 * q.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 9, 3, K)}, "q has H=3 heads, expected a multiple of k's G=2"),
        ({"window": 0}, "window=0, expected at least 1"),
        ({"initial_state": {"k": torch.zeros(1)}}, r"initial_state has keys \['k'\], expected k, v and length"),
        ({"backend": "flash"}, "backend=flash can't run here: flash needs a CUDA device"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    if torch.cuda.is_available() and "backend" in change:
        pytest.skip("this machine has CUDA")
    arguments = {"q": torch.zeros(2, 9, H, K), "k": torch.zeros(2, 9, G, K), "v": torch.zeros(2, 9, G, V)} | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(**arguments)


def test_a_past_of_the_wrong_length_is_refused():
    q, k, v = (x.float() for x in case(4, past=False)[0].values())
    state = {"k": k, "v": v, "length": torch.tensor([4, 5])}
    with pytest.raises(ValueError, match=r"length\] is \(4, 5\), but must be at most the S=4 rows"):
        softmax_attention(q, k, v, initial_state=state)


@pytest.mark.parametrize("window", [None, 16], ids=["full", "window"])
def test_one_document_costs_what_a_row_does(window):
    def cost(cu_seqlens):
        tracer = Tracer()
        q, k, v = (tracer.empty(1, 61, H, K, requires_grad=True) for _ in range(3))
        with tracer, tracer.record() as work:
            chunked.run(q, k, v, window, 0.5, None, cu_seqlens)
        return vars(work) | {"peak": work.peak.tolist(), "kept": work.kept.tolist()}

    assert cost(boundaries([61])) == cost(None)
