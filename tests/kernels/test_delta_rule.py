"""The delta rule: the chunked form against the float64 definition, with every kind of decay, beta to 2, alike keys."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtrain.kernels import delta_rule, states
from seqtrain.kernels.triangular import unit_lower_inverse
from seqtrain.testing import (
    assert_within,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)

DECAY_SHAPES = ("none", "BTH", "BTHK")
DECAYS = [("none", "mild"), *itertools.product(("BTH", "BTHK"), ("mild", "wide", "strong", "spikes", "zero"))]


@pytest.mark.parametrize("tokens", [1, 17, 63, 130])
@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
def test_rows_match_the_definition(decay_shape, decay, tokens):
    # One token without documents would be decoded by the definition itself.
    documents = {"cu_seqlens": boundaries([1])} if tokens == 1 else {}
    batch = 1 if documents else 2
    tensors = recurrence_inputs(tokens, batch=batch, decay_shape=decay_shape, decay=decay, beta=1.0)
    assert_within(compare_with_oracle(delta_rule, tensors, **documents), torch.float32)


@pytest.mark.parametrize("lengths", [(130, 0, 1, 1, 3, 65), (0, 0), (2,) * 40, (64, 128), (1, 200)])
@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
def test_documents_match_the_definition(decay_shape, lengths):
    tensors = recurrence_inputs(sum(lengths), states=len(lengths), decay_shape=decay_shape, decay="wide", beta=2.0)
    assert_within(compare_with_oracle(delta_rule, tensors, cu_seqlens=boundaries(lengths)), torch.float32)


@pytest.mark.parametrize("correlation", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
def test_beta_to_two_and_keys_that_are_alike(decay_shape, correlation):
    tensors = recurrence_inputs(
        130, decay_shape=decay_shape, beta=2.0, correlation=correlation, key_width=16, value_width=24
    )
    assert_within(compare_with_oracle(delta_rule, tensors), torch.float32)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_constant_beta(beta):
    tensors = recurrence_inputs(130, decay_shape="BTHK", decay="wide", beta=1.0)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    assert_within(compare_with_oracle(delta_rule, tensors), torch.float32)


@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
@pytest.mark.parametrize("key_width", [8, 40])  # chunks of 32 and of 64 tokens
def test_the_algebra_is_exact_in_float64(decay_shape, key_width):
    tensors = recurrence_inputs(150, batch=2, key_width=key_width, decay_shape=decay_shape, decay="spikes", beta=2.0)
    assert_within(compare_with_oracle(delta_rule, tensors, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
def test_bfloat16_inputs(decay_shape, decay):
    tensors = recurrence_inputs(130, states=3, decay_shape=decay_shape, decay=decay, beta=2.0)
    errors = compare_with_oracle(delta_rule, tensors, dtype=torch.bfloat16, cu_seqlens=boundaries([70, 0, 60]))
    assert_within(errors, torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5),
    # Keys of 1 to 3 numbers wipe the state within a few tokens; what little gradient reaches the initial state is then
    # a small difference of large terms in any chunk form (5e-5 seen at K=1).
    widths=st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(1, 20)),
    decay_shape=st.sampled_from(DECAY_SHAPES),
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
        beta=1.0,
        seed=seed,
    )
    assert_within(compare_with_oracle(delta_rule, tensors, cu_seqlens=boundaries(lengths)), torch.float32)


@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
def test_many_segments_equal_one(decay_shape, monkeypatch):
    tensors = recurrence_inputs(400, states=3, key_width=40, decay_shape=decay_shape, decay="wide", beta=1.0)
    options = {"cu_seqlens": boundaries([250, 20, 130]), "backend": "chunked"}
    whole = run_with_gradients(delta_rule, tensors, **options)
    monkeypatch.setattr(states, "SEGMENT_NUMBERS", 1)
    parts = run_with_gradients(delta_rule, tensors, **options)
    assert all(relative_error(parts[name], whole[name]) < 1e-13 for name in whole)


@pytest.mark.parametrize("decay_shape", DECAY_SHAPES)
def test_a_split_in_time_with_the_state_carried_equals_the_whole(decay_shape):
    tensors = recurrence_inputs(150, batch=2, decay_shape=decay_shape, beta=2.0)
    state = tensors.pop("initial_state")
    out, final = delta_rule(**tensors, initial_state=state, backend="chunked")
    outs = []
    for start, end in ((0, 67), (67, 68), (68, 150)):
        piece = {name: None if x is None else x[:, start:end] for name, x in tensors.items()}
        piece_out, state = delta_rule(**piece, initial_state=state, backend="chunked")
        outs.append(piece_out)
    torch.testing.assert_close(torch.cat(outs, 1), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


def test_a_document_never_feels_another():
    tensors = recurrence_inputs(100, states=2, decay_shape="BTH", beta=1.0)
    options = {"cu_seqlens": boundaries([40, 60]), "backend": "chunked"}
    before = run_with_gradients(delta_rule, tensors, **options)
    changed = {**tensors, "v": tensors["v"].clone()}
    changed["v"][:, 39] += 1000.0
    after = run_with_gradients(delta_rule, changed, **options)
    assert not torch.equal(after["out"][:, 39], before["out"][:, 39])
    for name in ("out", "grad q", "grad k", "grad v", "grad beta", "grad log_decay"):
        assert torch.equal(after[name][:, 40:], before[name][:, 40:]), name
    assert torch.equal(after["final_state"][1], before["final_state"][1])


def wide_inputs(tokens, **options):
    """Inputs whose reading and erasing vectors are other than their keys, each nearly parallel to the other."""
    tensors = recurrence_inputs(tokens, beta=1.0, **options)
    generator = torch.Generator().manual_seed(9)
    shape = tensors["k"].shape
    read = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    return tensors | {"read": read, "erase": read * torch.rand(shape, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("lengths", [(130,), (70, 0, 1, 79), (2,) * 20])
@pytest.mark.parametrize(("decay_shape", "decay"), [("none", "mild"), ("BTH", "wide"), ("BTHK", "wide")])
def test_reading_and_erasing_apart_from_the_key(decay_shape, decay, lengths):
    tensors = wide_inputs(sum(lengths), states=len(lengths), decay_shape=decay_shape, decay=decay)
    documents = {"cu_seqlens": boundaries(lengths)}
    assert_within(compare_with_oracle(delta_rule, tensors, dtype=torch.float64, **documents), torch.float64)
    assert_within(compare_with_oracle(delta_rule, tensors, **documents), torch.float32)


def test_the_transition_is_decay_less_the_product_of_both_vectors():
    # RWKV-7's own form, S (diag(w) - read^T erase) in its layout, multiplied out token by token.
    tensors = wide_inputs(40, decay_shape="BTHK")
    out, final = delta_rule(**tensors, scale=1.0, backend="chunked")
    state, rows = tensors["initial_state"], []
    for t in range(40):
        q, k, v, read, erase = (tensors[name][:, t] for name in ("q", "k", "v", "read", "erase"))
        decay, beta = tensors["log_decay"][:, t].exp(), tensors["beta"][:, t, :, None, None]
        transition = torch.diag_embed(decay) - beta * erase[..., None] * (read * decay)[..., None, :]
        state = transition @ state + beta * k[..., None] * v[..., None, :]
        rows.append((q[..., None, :] @ state)[..., 0, :])
    assert relative_error(out, torch.stack(rows, 1)) < 1e-12
    assert relative_error(final, state) < 1e-12


def test_read_and_erase_equal_to_k_change_nothing():
    tensors = recurrence_inputs(100, decay_shape="BTH", beta=1.0)
    plain = run_with_gradients(delta_rule, tensors, backend="chunked")
    wide = run_with_gradients(delta_rule, tensors | {"read": tensors["k"], "erase": tensors["k"]}, backend="chunked")
    for name in ("out", "final_state", "grad q", "grad v", "grad beta", "grad log_decay", "grad initial_state"):
        assert relative_error(wide[name], plain[name]) < 1e-12, name
    together = wide["grad k"] + wide["grad read"] + wide["grad erase"]
    assert relative_error(together, plain["grad k"]) < 1e-12


def test_autocast_changes_nothing():
    tensors = {name: x.float() for name, x in recurrence_inputs(70, decay_shape="BTHK", beta=1.0).items()}
    plain = run_with_gradients(delta_rule, tensors, backend="chunked")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run_with_gradients(delta_rule, tensors, backend="chunked")
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


@pytest.mark.parametrize("size", [1, 8, 16, 64])
def test_triangular_inverse_of_a_matrix_whose_powers_explode(size):
    # All keys equal and beta = 2: the powers of L reach 1e18 at 64, the inverse has entries of 2 at most.
    strict = torch.full((3, size, size), 2.0)
    unit = strict.double().tril(-1) + torch.eye(size, dtype=torch.float64)
    assert relative_error(unit_lower_inverse(strict), torch.linalg.inv(unit)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.rand(1, 10, 2, 8)}, r"delta_rule: beta has shape \(1, 10, 2, 8\), expected \[B, T, H\]"),
        ({"log_decay": torch.zeros(2)}, r"log_decay has shape \(2,\), expected \[B, T, H\] or \[B, T, H, K\]"),
        ({"beta": torch.ones(1, 10, 2, dtype=torch.int32)}, "beta has dtype torch.int32, expected a floating dtype"),
        ({"backend": "triton"}, "delta_rule: backend=triton can't run here: triton needs a CUDA device"),
        ({"read": torch.rand(1, 10, 2, 8)}, "delta_rule: erase is None, expected both read and erase, or neither"),
        (
            {"read": torch.rand(1, 10, 2, 8), "erase": torch.rand(1, 10, 2, 7)},
            r"delta_rule: erase has shape \(1, 10, 2, 7\), expected \[B, T, H, K\] with K=8",
        ),
        (
            {"read": torch.rand(1, 10, 2, 8), "erase": torch.rand(1, 10, 2, 8), "backend": "native"},
            "delta_rule: backend=native has no read and erase; use chunked or auto",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {**recurrence_inputs(10, beta=1.0), **change}
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments)
