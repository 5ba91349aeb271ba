"""Windowed attention with sinks and an extra entry, held to its definition and to softmax_attention."""

import pytest
import torch

from seqtrain.kernels import sink_attention, softmax_attention
from seqtrain.testing import relative_error
from tests.kernels.contract_cases import Case, assert_equal, call, run

H, G, K, V = 4, 2, 6, 5


def inputs(batch, tokens, *, extra=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, tokens, *shape, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(H, K), "k": normal(G, K), "v": normal(G, V)}
    if extra:
        tensors |= {"extra_score": normal(H), "extra_value": normal(H, V)}
        # Some tokens have no memory at all.
        tensors["extra_score"][:, ::3] = -torch.inf
    return tensors


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [1, 4, 20, 100])
def test_chunked_equals_reference(window, sinks, extra):
    case = Case(sink_attention, {"window": window, "sinks": sinks})
    for before in (None, 2, 50):
        state = None
        if before:
            _, state = call(case, inputs(2, before, extra=extra, seed=9), backend="reference")
        for tokens in (1, 37):
            tensors = inputs(2, tokens, extra=extra)
            expected = run(case, tensors, state, backend="reference")
            assert_equal(run(case, tensors, state, backend="chunked"), expected, 1e-12)


def test_without_sinks_it_is_a_sliding_window():
    tensors = inputs(2, 50, extra=False)
    out, _ = sink_attention(**tensors, window=8)
    assert relative_error(out, softmax_attention(**tensors, window=8)[0]) < 1e-12


def test_a_window_over_everything_counts_sinks_once():
    tensors = inputs(1, 30, extra=False)
    out, _ = sink_attention(**tensors, window=30, sinks=4)
    assert relative_error(out, softmax_attention(**tensors)[0]) < 1e-12


def test_large_scores_keep_both_terms_under_one_maximum():
    """With a maximum taken from one term only, the other one overflows or vanishes."""
    tensors = inputs(1, 20)
    tensors["extra_score"] = tensors["extra_score"].nan_to_num(neginf=0.0) + 500
    tensors["q"] = tensors["q"] * 300
    single = {key: x.float() for key, x in tensors.items()}
    out, _ = sink_attention(**single, window=4, sinks=1)
    expected, _ = sink_attention(**tensors, window=4, sinks=1, backend="reference")
    assert relative_error(out, expected) < 1e-4


def test_mistakes_are_named():
    tensors = inputs(1, 4)
    with pytest.raises(ValueError, match="window=0"):
        sink_attention(**tensors, window=0)
    with pytest.raises(ValueError, match="come together"):
        sink_attention(tensors["q"], tensors["k"], tensors["v"], tensors["extra_score"], window=2)
    _, state = sink_attention(**tensors, window=3, sinks=1)
    with pytest.raises(ValueError, match=r"k of: initial_state has shape \(1, 2, 2, 6\), expected \(1, 4"):
        sink_attention(**tensors, window=5, sinks=1, initial_state=state)
