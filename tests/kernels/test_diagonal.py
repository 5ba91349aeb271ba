"""What is particular to the diagonal operators: hard decays, gradients of complex numbers, impulses, what is kept."""

import pytest
import torch

from seqtrain.kernels import diagonal_scan, diagonal_system
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, relative_error
from tests.kernels.contract_cases import Case, check

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


@pytest.mark.parametrize("decay", ["wide", "strong", "spikes", "zero"])
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
