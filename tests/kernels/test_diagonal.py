"""What is particular to the diagonal operators: hard decays, gradients of complex numbers, impulses, what is kept."""

import pytest
import torch

from seqtrain.kernels import diagonal_scan, diagonal_system
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, decay_like, relative_error

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


def normal(*shape, of_complex=False, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.complex128 if of_complex else torch.float64)


def case(tokens, *, documents=False, x_complex=False, a_complex=False, constant=False, decay="wide"):
    lengths = [0, 1, tokens // 3, 0, tokens - tokens // 3 - 1, 0]
    batch = 1 if documents else 2
    log_a = decay_like((D,) if constant else (batch, tokens, D), decay, torch.Generator().manual_seed(1))
    if a_complex:
        log_a = torch.complex(log_a, normal(*log_a.shape, seed=5))
    tensors = {
        "x": normal(batch, tokens, D, of_complex=x_complex),
        "log_a": log_a,
        "initial_state": normal(len(lengths) if documents else batch, D, of_complex=x_complex or a_complex),
    }
    return tensors, boundaries(lengths) if documents else None


@pytest.mark.parametrize("decay", ["wide", "strong", "spikes", "zero"])
@pytest.mark.parametrize("tokens", [130, 2200])
def test_every_kind_of_decay_of_the_scan(tokens, decay):
    assert_within(compare_with_oracle(diagonal_scan, case(tokens, decay=decay)[0]), torch.float32)


def test_gradcheck():
    tensors, cu_seqlens = case(70, documents=True, a_complex=True)
    inputs = [x[..., :2].clone().requires_grad_() for x in tensors.values()]

    def scan(x, log_a, state):
        return diagonal_scan(x, log_a, initial_state=state, cu_seqlens=cu_seqlens, backend="chunked")

    assert torch.autograd.gradcheck(scan, inputs, fast_mode=True)


def test_a_complex_scan_of_real_inputs_is_complex():
    x, log_a = torch.randn(1, 9, D, dtype=torch.bfloat16), -torch.rand(1, 9, D)
    out, state = diagonal_scan(x, torch.complex(log_a, log_a))
    assert (out.dtype, state.dtype) == (torch.complex64, torch.complex64)


@pytest.mark.parametrize("form", ["scan", "fft"])
@pytest.mark.parametrize("tokens", [64, 1100])
def test_fast_rotations(tokens, form):
    assert_within(compare_with_oracle(diagonal_system, system(tokens), form=form), torch.float32)


def test_a_system_is_a_scan_between_a_writing_and_a_reading():
    u, log_a, write, read, state = system(40).values()
    hidden, final = diagonal_scan((u[..., None] * write).flatten(2), log_a.flatten(), initial_state=state)
    out, last = diagonal_system(u, log_a, write, read, initial_state=state)
    assert relative_error(out, (hidden.unflatten(2, (G, N)) * read).sum(3).real) < 1e-12
    assert relative_error(last, final) < 1e-12


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


def test_an_unknown_form_is_refused():
    matrix = torch.zeros(G, N, dtype=torch.complex64)
    with pytest.raises(ValueError, match="form='convolution', expected 'scan' or 'fft'"):
        diagonal_system(torch.zeros(1, 5, G), matrix, matrix, matrix, form="convolution")
