"""Linear attention: the chunked form against the float64 definition, in every shape and with every kind of decay."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtrain.kernels import linear_attention, states
from seqtrain.testing import (
    DECAY_SHAPES,
    assert_within,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)

DECAYS = [("none", "mild"), *itertools.product(("H", "BTH", "BTHK"), ("mild", "wide", "strong", "spikes", "zero"))]


@pytest.mark.parametrize("tokens", [1, 17, 63, 130])
@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
def test_rows_match_the_definition(decay_shape, decay, tokens):
    tensors = recurrence_inputs(tokens, batch=2, decay_shape=decay_shape, decay=decay)
    # One token without documents would be decoded by the definition itself.
    documents = {"cu_seqlens": boundaries([1])} if tokens == 1 else {}
    if documents:
        tensors = recurrence_inputs(1, decay_shape=decay_shape, decay=decay)
    assert_within(compare_with_oracle(linear_attention, tensors, **documents), torch.float32)


@pytest.mark.parametrize("lengths", [(130, 0, 1, 1, 3, 65), (0, 0), (2,) * 40, (64, 128), (1, 200)])
@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
def test_documents_match_the_definition(decay_shape, lengths):
    tensors = recurrence_inputs(sum(lengths), states=len(lengths), decay_shape=decay_shape, decay="wide")
    errors = compare_with_oracle(linear_attention, tensors, cu_seqlens=boundaries(lengths))
    assert_within(errors, torch.float32)


@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
@pytest.mark.parametrize("key_width", [8, 40])  # chunks of 32 and of 64 tokens
def test_the_algebra_is_exact_in_float64(decay_shape, key_width):
    tensors = recurrence_inputs(150, batch=2, key_width=key_width, decay_shape=decay_shape, decay="spikes")
    assert_within(compare_with_oracle(linear_attention, tensors, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
def test_bfloat16_inputs(decay_shape, decay):
    tensors = recurrence_inputs(130, states=3, decay_shape=decay_shape, decay=decay)
    errors = compare_with_oracle(linear_attention, tensors, dtype=torch.bfloat16, cu_seqlens=boundaries([70, 0, 60]))
    assert_within(errors, torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    # Not "H": its gradient is a sum over tokens, which for some seeds cancels to a thousandth of its terms.
    decay_shape=st.sampled_from(["none", "BTH", "BTHK"]),
    decay=st.sampled_from(["mild", "wide", "strong", "spikes"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths, widths, decay_shape, decay, seed):
    heads, key_width, value_width = widths
    tensors = recurrence_inputs(
        sum(lengths),
        heads=heads,
        key_width=key_width,
        value_width=value_width,
        states=len(lengths),
        decay_shape=decay_shape,
        decay=decay,
        seed=seed,
    )
    errors = compare_with_oracle(linear_attention, tensors, cu_seqlens=boundaries(lengths))
    assert_within(errors, torch.float32)


@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
def test_many_segments_equal_one(decay_shape, monkeypatch):
    tensors = recurrence_inputs(400, states=3, key_width=40, decay_shape=decay_shape, decay="wide")
    options = {"cu_seqlens": boundaries([250, 20, 130]), "backend": "chunked"}
    whole = run_with_gradients(linear_attention, tensors, **options)
    monkeypatch.setattr(states, "SEGMENT_NUMBERS", 1)
    parts = run_with_gradients(linear_attention, tensors, **options)
    assert all(relative_error(parts[name], whole[name]) < 1e-13 for name in whole)


@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_a_split_in_time_with_the_state_carried_equals_the_whole(decay_shape):
    tensors = recurrence_inputs(150, batch=2, decay_shape=decay_shape)
    state = tensors.pop("initial_state")
    out, final = linear_attention(**tensors, initial_state=state, backend="chunked")
    outs = []
    for start, end in ((0, 67), (67, 68), (68, 150)):
        piece = {name: None if x is None else x[:, start:end] for name, x in tensors.items()}
        piece_out, state = linear_attention(**piece, initial_state=state, backend="chunked")
        outs.append(piece_out)
    torch.testing.assert_close(torch.cat(outs, 1), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


def test_a_document_never_feels_another():
    tensors = recurrence_inputs(100, states=2, decay_shape="BTHK")
    options = {"cu_seqlens": boundaries([40, 60]), "backend": "chunked"}
    before = run_with_gradients(linear_attention, tensors, **options)
    changed = {**tensors, "v": tensors["v"].clone()}
    changed["v"][:, 39] += 1000.0
    after = run_with_gradients(linear_attention, changed, **options)
    assert not torch.equal(after["out"][:, 39], before["out"][:, 39])
    for name in ("out", "grad q", "grad k", "grad v", "grad log_decay"):
        assert torch.equal(after[name][:, 40:], before[name][:, 40:]), name
    assert torch.equal(after["final_state"][1], before["final_state"][1])


def test_strong_decays_leave_finite_results_and_exact_zeros():
    tensors = recurrence_inputs(70, decay_shape="BTHK", decay="strong")
    tensors["log_decay"] = tensors["log_decay"] * 250  # -1e4 a token
    tensors = {name: x.float() for name, x in tensors.items()}
    results = run_with_gradients(linear_attention, tensors, backend="chunked")
    assert all(torch.isfinite(x).all() for x in results.values())
    assert not results["grad log_decay"].any()
    own = (tensors["q"] * tensors["k"]).sum(-1, keepdim=True) * tensors["v"] * 8**-0.5
    torch.testing.assert_close(results["out"], own)


@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
def test_a_reset_by_decay_costs_no_digits_afterwards(decay_shape):
    tensors = recurrence_inputs(130, decay_shape=decay_shape)
    tensors["log_decay"][:, ::40] = -1e4
    assert_within(compare_with_oracle(linear_attention, tensors), torch.float32)


def test_dtypes_of_results_and_autocast():
    tensors = {name: x.bfloat16() for name, x in recurrence_inputs(20, decay_shape="BTH").items()}
    out, state = linear_attention(**tensors)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    tensors = {name: x.float() for name, x in tensors.items()}
    plain = run_with_gradients(linear_attention, tensors, backend="chunked")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run_with_gradients(linear_attention, tensors, backend="chunked")
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


def test_strided_inputs_and_results_that_may_be_changed():
    tensors = recurrence_inputs(70, decay_shape="BTH")
    strided = {
        name: None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()
    }
    expected = run_with_gradients(linear_attention, tensors, backend="chunked")
    came = run_with_gradients(linear_attention, strided, backend="chunked")
    assert all(relative_error(came[name], expected[name]) < 1e-14 for name in expected)
    q = tensors.pop("q").requires_grad_()
    out, state = linear_attention(q, **tensors, backend="chunked")
    out.mul_(2)
    state.mul_(2)
    (out.sum() + state.sum()).backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.randn(1, 9, 2, 8)},
            r"linear_attention: k has shape \(1, 9, 2, 8\), expected \[B, T, H, K\] with T=10",
        ),
        ({"log_decay": torch.zeros(3)}, r"log_decay has shape \(3,\), expected \[H\] with H=2"),
        ({"v": torch.zeros(1, 10, 2, 5, dtype=torch.int64)}, "v has dtype torch.int64, expected a floating dtype"),
        (
            {"initial_state": torch.zeros(1, 2, 5, 8)},
            r"initial_state has shape \(1, 2, 5, 8\), expected \(1, 2, 8, 5\)",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens must rise from 0 to T=10"),
        ({"backend": "chunkd"}, "did you mean 'chunked'"),
        ({"backend": "triton"}, "needs a CUDA device"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {**recurrence_inputs(10), **change}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)
