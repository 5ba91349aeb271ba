"""diagonal_system: chunks, FFT and gradients against the float64 loop, fast rotations, documents, states."""

import pytest
import torch

from seqtrain.kernels import diagonal_scan, diagonal_system
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, relative_error

G, N = 3, 4


def case(tokens, *, documents=False, fastest=100.0):
    """Decays from 1e-3 to 1 a token, phases to `fastest` radians a token, as those of S4D-Inv with large steps."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = [0, 1, tokens // 3, 0, tokens - tokens // 3 - 1, 0]
    batch = 1 if documents else 2

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decay = -torch.exp(-7 * torch.rand(G, N, generator=generator, dtype=torch.float64))
    tensors = {
        "u": normal(batch, tokens, G),
        "log_a": torch.complex(decay, fastest * torch.rand(G, N, generator=generator, dtype=torch.float64)),
        "write": normal(G, N, dtype=torch.complex128),
        "read": normal(G, N, dtype=torch.complex128),
        "initial_state": normal(len(lengths) if documents else batch, G * N, dtype=torch.complex128),
    }
    return tensors, boundaries(lengths) if documents else None


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("form", ["scan", "fft"])
@pytest.mark.parametrize("tokens", [2, 17, 64, 130, 1100])
def test_chunks_and_fft_equal_the_loop(tokens, form, documents):
    tensors, cu_seqlens = case(tokens, documents=documents)
    assert_within(compare_with_oracle(diagonal_system, tensors, form=form, cu_seqlens=cu_seqlens), torch.float32)


def test_float64_is_kept_and_exact():
    tensors, cu_seqlens = case(130, documents=True)
    errors = compare_with_oracle(diagonal_system, tensors, dtype=torch.float64, cu_seqlens=cu_seqlens)
    assert_within(errors, torch.float64)


def test_it_is_a_scan_between_a_writing_and_a_reading():
    tensors, _ = case(40)
    u, log_a, write, read, state = tensors.values()
    hidden, final = diagonal_scan((u[..., None] * write).flatten(2), log_a.flatten(), initial_state=state)
    out, last = diagonal_system(u, log_a, write, read, initial_state=state)
    assert relative_error(out, (hidden.unflatten(2, (G, N)) * read).sum(3).real) < 1e-12
    assert relative_error(last, final) < 1e-12


def test_the_impulse_response_is_what_an_impulse_gives():
    tensors, _ = case(150)
    _, log_a, write, read, _ = tensors.values()
    impulse = torch.zeros(1, 150, G, dtype=torch.float64)
    impulse[:, 0] = 1
    time = torch.arange(150)[:, None, None]
    expected = (read * write * (log_a * time).exp()).sum(2).real
    for form in ("scan", "fft"):
        assert relative_error(diagonal_system(impulse, log_a, write, read, form=form)[0][0], expected) < 1e-12


@pytest.mark.parametrize("cut", [1, 64, 99])
def test_any_cut_in_time_equals_the_whole(cut):
    tensors, _ = case(100)
    u, *system, start = tensors.values()
    whole, final = diagonal_system(u, *system, initial_state=start)
    first, state = diagonal_system(u[:, :cut], *system, initial_state=start)
    second, state = diagonal_system(u[:, cut:], *system, initial_state=state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    assert relative_error(state, final) < 1e-12


@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_a_segment_is_an_affine_map_of_its_state(tokens):
    u, *system, start = case(max(tokens, 2))[0].values()
    u = u[:, :tokens]
    segment = diagonal_system.segment((u, *system), {}, "auto")
    transition, update = segment.transition()
    segment.local_output()
    out, final = diagonal_system(u, *system, initial_state=start)
    assert diagonal_system.state_shape((u, *system), {}, 2) == (tuple(update.shape), update.dtype)
    assert segment.transition_shape((u, *system), {}) == tuple(transition.shape)
    assert relative_error(transition * start + update, final) < 1e-11
    assert relative_error(segment.add_incoming(start), out) < 1e-11


def test_no_state_of_a_token_is_kept_for_the_backward_pass():
    """64 states a channel: kept one by one they would be 64 times the input, complex."""
    log_a = torch.complex(-torch.rand(8, 64), torch.rand(8, 64)).requires_grad_()
    u, kept = torch.randn(1, 4096, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        diagonal_system(u, log_a, torch.ones_like(log_a), torch.ones_like(log_a))
    assert max(kept) <= 4 * u.numel()
    assert sum(kept) <= 20 * u.numel()


def test_no_tokens_leave_the_state():
    _, *system, state = case(2)[0].values()
    out, final = diagonal_system(torch.zeros(2, 0, G, dtype=torch.float64), *system, initial_state=state)
    assert out.shape == (2, 0, G)
    assert torch.equal(final, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"write": torch.zeros(G, N)}, "write has dtype torch.float32, expected a complex dtype"),
        ({"read": torch.zeros(G, N + 1, dtype=torch.complex64)}, "read has shape .* with N=4"),
        ({"form": "convolution"}, "form='convolution', expected 'scan' or 'fft'"),
        ({"initial_state": torch.zeros(1, G)}, r"initial_state has shape \(1, 3\), expected \(1, 12\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    system = {name: torch.zeros(G, N, dtype=torch.complex64) for name in ("log_a", "write", "read")}
    with pytest.raises(ValueError, match=message):
        diagonal_system(**{"u": torch.zeros(1, 5, G), **system, **change})
