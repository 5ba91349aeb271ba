"""What is particular to recurrences: hard decays, alike keys, identities, gradients of complex numbers, impulses."""

import itertools
import random
import sys
import warnings

import pytest
import torch

from seqtrain.kernels import chunk_form, delta_rule, diagonal_scan, diagonal_system, linear_attention, slot_scores
from seqtrain.kernels.native import build as native
from seqtrain.testing import (
    assert_within,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)
from tests.kernels.contract_cases import Case, check

BETA = {linear_attention: None, delta_rule: 2.0}
DECAYS = [
    ("none", "mild"),
    *itertools.product(("H", "BTH", "BTHK"), ("mild", "wide", "strong", "spikes", "zero", "huge")),
]
needs_library = pytest.mark.skipif(native.unavailable() is not None, reason="no native library")
BACKENDS = ["chunked", pytest.param("native", marks=needs_library)]
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


@pytest.mark.all
@every_backend
@pytest.mark.parametrize("seed", range(20))
def test_any_shape(seed, backend):
    """Not shorter keys than 4: 1 to 3 numbers wipe the state within a few tokens, and what little gradient reaches the
    initial state is then a small difference of large terms in any chunk form of the delta rule (5e-5 seen at K=1).
    """
    draw = random.Random(seed)
    operator, lengths = draw.choice(list(BETA)), [draw.randint(0, 80) for _ in range(draw.randint(1, 5))]
    tensors = recurrence_inputs(
        sum(lengths),
        heads=draw.randint(1, 4),
        key_width=draw.randint(4, 70),
        value_width=draw.randint(1, 70),
        states=len(lengths),
        # Not "H": its gradient is a sum over tokens, which for some seeds cancels to a thousandth of its terms.
        decay_shape=draw.choice(["none", "BTH", "BTHK"]),
        decay=draw.choice(["mild", "wide", "strong", "spikes"]),
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
    monkeypatch.setattr(chunk_form, "SEGMENT_NUMBERS", 1)
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


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_may_be_changed_before_the_backward_pass(backend, dtype):
    tensors = recurrence_inputs(70, decay_shape="BTH", beta=2.0)
    tensors = {name: x.to(torch.float32 if "state" in name else dtype) for name, x in tensors.items()}
    q = tensors.pop("q").requires_grad_()
    out, state = delta_rule(q, **tensors, backend=backend)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
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


def test_a_layout_first_met_in_inference_mode_serves_training():
    tensors = recurrence_inputs(44, states=3)
    options = {"cu_seqlens": boundaries([11, 31, 2]), "backend": "chunked"}
    with torch.inference_mode():
        expected, _ = linear_attention(**tensors, **options)
    assert torch.equal(run_with_gradients(linear_attention, tensors, **options)["out"], expected)


def test_read_and_erase_equal_to_k_change_nothing():
    tensors = recurrence_inputs(100, decay_shape="BTH", beta=1.0)
    plain = run_with_gradients(delta_rule, tensors, backend="chunked")
    wide = run_with_gradients(delta_rule, tensors | {"read": tensors["k"], "erase": tensors["k"]}, backend="chunked")
    for name in ("out", "final_state", "grad q", "grad v", "grad beta", "grad log_decay", "grad initial_state"):
        assert relative_error(wide[name], plain[name]) < 1e-12, name
    together = wide["grad k"] + wide["grad read"] + wide["grad erase"]
    assert relative_error(together, plain["grad k"]) < 1e-12


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


G, N, D = 3, 4, 5


def system(tokens, *, fastest=100.0):
    """Decays from 1e-3 to 1 per token, phases to `fastest` radians per token, as those of S4D-Inv with large steps."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decay = -torch.exp(-7 * torch.rand(G, N, generator=generator, dtype=torch.float64))
    return {
        "u": normal(2, tokens, G),
        "log_a": torch.complex(decay, fastest * torch.rand(G, N, generator=generator, dtype=torch.float64)),
        "write": normal(G, N, dtype=torch.complex128),
        "read": normal(G, N, dtype=torch.complex128),
        "initial_state": normal(2, G * N, dtype=torch.complex128),
    }


@pytest.mark.parametrize("decay", ["wide", "strong", "spikes", "zero", "huge"])
@pytest.mark.parametrize("tokens", [130, 2200])
def test_every_kind_of_decay_of_the_scan(tokens, decay):
    check(Case(diagonal_scan, {}, {"log_a": "B T D"}, decay=decay), "chunked", tokens, torch.float32, past=True)


def test_gradcheck():
    case = Case(diagonal_scan, {}, {"log_a": "B T D"}, complex=("log_a",), sizes={"D": 2})
    inputs = [*case.tensors(70, batch=1).values(), case.state(3, packed=True)]

    def scan(x, log_a, state):
        cu_seqlens = boundaries([0, 23, 47])
        return diagonal_scan(x, log_a, initial_state=state, cu_seqlens=cu_seqlens, backend="chunked")

    assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("form", ["scan", "fft"])
@pytest.mark.parametrize("tokens", [64, 1100])
def test_fast_rotations(tokens, form):
    assert_within(compare_with_oracle(diagonal_system, system(tokens), form=form), torch.float32)


def test_the_impulse_response_is_what_an_impulse_gives():
    _, log_a, write, read, _ = system(150).values()
    impulse = torch.zeros(1, 150, G, dtype=torch.float64)
    impulse[:, 0] = 1
    time = torch.arange(150)[:, None, None]
    expected = (read * write * (log_a * time).exp()).sum(2).real
    for form in ("scan", "fft"):
        assert relative_error(diagonal_system(impulse, log_a, write, read, form=form)[0][0], expected) < 1e-12


def test_no_state_of_a_token_is_kept_for_the_backward_pass():
    """64 states per channel: kept one by one they would be 64 times the input, complex."""
    log_a = torch.complex(-torch.rand(8, 64), torch.rand(8, 64)).requires_grad_()
    u, kept = torch.randn(1, 4096, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        diagonal_system(u, log_a, torch.ones_like(log_a), torch.ones_like(log_a))
    assert max(kept) <= 4 * u.numel()
    assert sum(kept) <= 20 * u.numel()


def test_keys_that_let_the_state_grow_are_told_of_once(monkeypatch):
    q, k, v = (torch.ones(1, 3, 1, 4) for _ in range(3))
    monkeypatch.setattr(sys.modules["seqtrain.kernels.delta_rule"], "_looked", False)
    with pytest.warns(UserWarning, match="delta_rule: keys have a norm of up to 2;"):
        delta_rule(q, k, v, torch.ones(1, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta_rule(q, k, v, torch.ones(1, 3, 1))
        monkeypatch.setattr(sys.modules["seqtrain.kernels.delta_rule"], "_looked", False)
        delta_rule(q, k / 2, v, torch.ones(1, 3, 1))
