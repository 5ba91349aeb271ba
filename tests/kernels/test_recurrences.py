"""What is particular to linear attention, the delta rule and slot scores: hard decays, alike keys, identities."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtrain.kernels import delta_rule, linear_attention, slot_scores, states
from seqtrain.kernels.native import build as native
from seqtrain.kernels.triangular import unit_lower_inverse
from seqtrain.testing import (
    assert_within,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)

BETA = {linear_attention: None, delta_rule: 2.0}
DECAYS = [("none", "mild"), *itertools.product(("H", "BTH", "BTHK"), ("mild", "wide", "strong", "spikes", "zero"))]
NATIVE = native.unavailable() is None
BACKENDS = ["chunked", pytest.param("native", marks=pytest.mark.skipif(not NATIVE, reason="no native library"))]
both = pytest.mark.parametrize("operator", BETA, ids=lambda operator: operator.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@both
@every_backend
@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
def test_every_kind_of_decay(operator, decay_shape, decay, backend):
    if operator is delta_rule and decay_shape == "H":
        pytest.skip("the delta rule has no constant decays")
    # Of the native kernels: chunks of 64 tokens, and widths that need padding.
    widths = {"key_width": 40, "value_width": 33} if backend == "native" else {}
    tensors = recurrence_inputs(130, states=3, decay_shape=decay_shape, decay=decay, beta=BETA[operator], **widths)
    for dtype in (torch.float32, torch.bfloat16):
        errors = compare_with_oracle(
            operator, tensors, dtype=dtype, cu_seqlens=boundaries([70, 0, 60]), backend=backend
        )
        assert_within(errors, dtype)


@both
@every_backend
@pytest.mark.parametrize("lengths", [(0, 0), (2,) * 40, (64, 128), (1, 200), (130, 0, 1, 17, 65)])
def test_documents_of_every_length(operator, lengths, backend):
    tensors = recurrence_inputs(sum(lengths), states=len(lengths), decay="wide", key_width=40, beta=BETA[operator])
    errors = compare_with_oracle(operator, tensors, cu_seqlens=boundaries(lengths), backend=backend)
    assert_within(errors, torch.float32)


@pytest.mark.all
@settings(max_examples=40, deadline=None)
@given(
    backend=st.sampled_from(["chunked", "native"] if NATIVE else ["chunked"]),
    operator=st.sampled_from(list(BETA)),
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5),
    # Keys of 1 to 3 numbers wipe the state within a few tokens; what little gradient reaches the initial state is then
    # a small difference of large terms in any chunk form of the delta rule (5e-5 seen at K=1).
    widths=st.tuples(st.integers(1, 4), st.integers(4, 70), st.integers(1, 70)),
    # Not "H": its gradient is a sum over tokens, which for some seeds cancels to a thousandth of its terms.
    decay_shape=st.sampled_from(["none", "BTH", "BTHK"]),
    decay=st.sampled_from(["mild", "wide", "strong", "spikes"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, operator, lengths, widths, decay_shape, decay, seed):
    heads, key_width, value_width = widths
    tensors = recurrence_inputs(
        sum(lengths),
        heads=heads,
        key_width=key_width,
        value_width=value_width,
        states=len(lengths),
        decay_shape=decay_shape,
        decay=decay,
        beta=None if operator is linear_attention else 1.0,
        seed=seed,
    )
    errors = compare_with_oracle(operator, tensors, cu_seqlens=boundaries(lengths), backend=backend)
    assert_within(errors, torch.float32)


@both
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_many_segments_equal_one(operator, decay_shape, monkeypatch):
    tensors = recurrence_inputs(
        400, states=3, key_width=40, decay_shape=decay_shape, decay="wide", beta=BETA[operator] and 1.0
    )
    options = {"cu_seqlens": boundaries([250, 20, 130]), "backend": "chunked"}
    whole = run_with_gradients(operator, tensors, **options)
    monkeypatch.setattr(states, "SEGMENT_NUMBERS", 1)
    parts = run_with_gradients(operator, tensors, **options)
    assert all(relative_error(parts[name], whole[name]) < 1e-13 for name in whole)


def test_strong_decays_leave_finite_results_and_exact_zeros():
    tensors = recurrence_inputs(70, decay_shape="BTHK", decay="strong")
    tensors["log_decay"] = tensors["log_decay"] * 250  # -1e4 per token
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


def test_results_may_be_changed_before_the_backward_pass():
    tensors = recurrence_inputs(70, decay_shape="BTH")
    q = tensors.pop("q").requires_grad_()
    out, state = linear_attention(q, **tensors, backend="chunked")
    out.mul_(2)
    state.mul_(2)
    (out.sum() + state.sum()).backward()
    assert q.grad.abs().sum() > 0


@every_backend
@pytest.mark.parametrize("correlation", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_beta_to_two_and_keys_that_are_alike(decay_shape, correlation, backend):
    tensors = recurrence_inputs(
        130, decay_shape=decay_shape, beta=2.0, correlation=correlation, key_width=16, value_width=24
    )
    assert_within(compare_with_oracle(delta_rule, tensors, backend=backend), torch.float32)


@every_backend
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_constant_beta(beta, backend):
    tensors = recurrence_inputs(130, decay_shape="BTHK", decay="wide", beta=1.0)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    assert_within(compare_with_oracle(delta_rule, tensors, backend=backend), torch.float32)


def test_the_transition_is_decay_less_the_product_of_both_vectors():
    # RWKV-7's own form, S (diag(w) - read^T erase) in its layout, multiplied out token by token.
    tensors = recurrence_inputs(40, decay_shape="BTHK", beta=1.0)
    tensors["read"] = torch.nn.functional.normalize(tensors["q"], dim=-1)
    tensors["erase"] = 0.7 * tensors["read"]
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": torch.rand(1, 10, 2, 8)}, "delta_rule: erase is None, expected both read and erase, or neither"),
        (
            {"read": torch.rand(1, 10, 2, 8), "erase": torch.rand(1, 10, 2, 8), "backend": "native"},
            "delta_rule: backend=native has no read and erase; use chunked or auto",
        ),
    ],
)
def test_read_and_erase_come_together_and_not_to_every_backend(change, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**recurrence_inputs(10, beta=1.0), **change)


@pytest.mark.parametrize("size", [1, 8, 16, 64])
def test_triangular_inverse_of_a_matrix_whose_powers_explode(size):
    # All keys equal and beta = 2: the powers of L reach 1e18 at 64, the inverse has entries of 2 at most.
    strict = torch.full((3, size, size), 2.0)
    unit = strict.double().tril(-1) + torch.eye(size, dtype=torch.float64)
    assert relative_error(unit_lower_inverse(strict), torch.linalg.inv(unit)) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_each_slots_key_is_a_memory_of_its_own(backend):
    """A slot is linear attention with one value column, decayed as the slot is."""
    tensors = recurrence_inputs(40, decay_shape="BTHK", decay="wide")
    q, k, decay = (tensors[name] for name in ("q", "k", "log_decay"))
    written, state = -torch.expm1(decay), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    out, after = slot_scores(q, k, written, decay, initial_state=state, backend=backend)
    for slot in range(8):
        value, past = written[..., slot : slot + 1], state[:, :, slot, :, None]
        alone, kept = linear_attention(q, k, value, decay[..., slot], initial_state=past, backend="reference")
        assert relative_error(out[..., slot], alone[..., 0]) < 1e-12
        assert relative_error(after[:, :, slot], kept[..., 0]) < 1e-12
