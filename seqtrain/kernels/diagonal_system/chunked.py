"""Matrix products over chunks of C tokens, and a scan over the states between them: no state of a token ever exists.

Inside a chunk the system is a convolution with its impulse response, a triangular Toeplitz matrix `[C,C]` per channel;
what a chunk adds to the state and what the state before it adds to its outputs are products with powers of a. Memory is
T/C states instead of T. The same matrices serve all chunks, so that their cost vanishes as T grows.

Powers are made in float64: the phase of `a^C` in float32 would be off by C times the rounding of log a.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels.diagonal_scan import diagonal_scan
from seqtrain.kernels.diagonal_system import diagonal_system
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.operator import Inputs

# Tokens per chunk, a power of two.
CHUNK = 64


@diagonal_system.backend(like=lambda inputs, state: inputs[0])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
    """See `diagonal_system`; the matrices have the state's dtype."""
    u, log_a, write, read = inputs
    if u.shape[1] == 0:
        return u, state
    chunks = _cut(u.shape[0], u.shape[1], cu_seqlens, u.device)
    with full_precision(u.device):
        matrices = _Matrices(log_a, write, read)
        rows = chunks.take(u.to(read.real.dtype))  # G I C
        before, final = _states(rows, matrices, chunks, state, u)
        if form == "fft" and cu_seqlens is None:
            out = _convolution(u.to(read.real.dtype), matrices) + _carried(state, matrices, u.shape[1])
        else:
            out = chunks.put(_read(before, matrices) + rows @ matrices.toeplitz(), u.shape)
    return out.to(u.dtype), final


def decayed_reading(log_a: Tensor, read: Tensor, state: Tensor, tokens: int) -> Tensor:
    """What a state `[B,G*N]` before `tokens` tokens without input adds to their outputs: real `[B,T,G]`."""
    with full_precision(state.device):
        return _carried(state, _Matrices(log_a, read, read), tokens)


class _Matrices:
    """Powers of `exp(log_a)` and what is made of them, one matrix per channel, in the dtype of `read`."""

    def __init__(self, log_a: Tensor, write: Tensor, read: Tensor):
        self.log_a = log_a.to(torch.complex128)
        self.write, self.read = write, read
        self.powers = self.power(torch.arange(CHUNK + 1, device=log_a.device))  # G N C+1

    def power(self, exponent: Tensor) -> Tensor:
        """`exp(log_a * exponent)`: int64 `[E]` -> `[G,N,E]`."""
        return (self.log_a[..., None] * exponent).exp().to(self.read.dtype)

    def log_chunk(self) -> Tensor:
        """`[G*N]`: the logarithm of `a^C`; exact, since C is a power of two."""
        return (self.log_a.flatten() * CHUNK).to(self.read.dtype)

    def written(self) -> Tensor:
        """Complex `[G,C,N]`: what an input at each place of a chunk has become in the state at its end."""
        return (self.powers[..., :-1].flip(2) * self.write[..., None]).mT

    def toeplitz(self) -> Tensor:
        """Real `[G,C,C]`, row the input's place and column the output's: the impulse response at their distance."""
        response = self.response(CHUNK)
        # Row j is the response after j zeros: one padded row, read each time one number further left.
        padded = F.pad(response, (CHUNK - 1, 0))
        return padded.unfold(1, CHUNK, 1).flip(1)

    def response(self, tokens: int) -> Tensor:
        """Real `[G,tokens]`: `Re(sum_n read_n a_n^t write_n)`, the output t tokens after a unit input."""
        starts = (
            self.power(torch.arange(0, tokens, CHUNK, device=self.read.device)) * (self.read * self.write)[..., None]
        )
        return _real_product(starts.mT, self.powers[..., :-1]).flatten(1)[:, :tokens]


def _real_product(a: Tensor, b: Tensor) -> Tensor:
    """`Re(a @ b)` of complex `[G,I,N]`, `[G,N,C]` as one real product."""
    return torch.cat([a.real, a.imag], 2) @ torch.cat([b.real, -b.imag], 1)


def _read(before: Tensor, matrices: _Matrices) -> Tensor:
    """What the states before chunks, complex `[G,I,N]`, add to the outputs in them: real `[G,I,C]`."""
    return _real_product(before, matrices.powers[..., 1:] * matrices.read[..., None])


def _carried(state: Tensor, matrices: _Matrices, tokens: int) -> Tensor:
    """What the states `[B,G*N]` before the first token add to the outputs of `tokens` tokens: real `[B,T,G]`."""
    starts = matrices.power(torch.arange(0, tokens, CHUNK, device=state.device)).permute(2, 0, 1)  # I G N
    before = (state.unflatten(1, matrices.read.shape)[:, None] * starts).permute(2, 0, 1, 3)  # G B I N
    out = _read(before.flatten(1, 2), matrices).unflatten(1, before.shape[1:3])  # G B I C
    return out.flatten(2)[..., :tokens].permute(1, 2, 0)


def _convolution(u: Tensor, matrices: _Matrices) -> Tensor:
    """The outputs from a zero state, `[B,T,G]`: a convolution with the whole impulse response, by FFT."""
    tokens = u.shape[1]
    # Twice the length, so that what wraps around meets zeros.
    response = torch.fft.rfft(matrices.response(tokens).T, n=2 * tokens, dim=0)
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * tokens, dim=1) * response, n=2 * tokens, dim=1)[:, :tokens]


@dataclass(frozen=True)
class _Chunks:
    """Rows or documents, each cut into chunks of its own, the last one padded with zeros.

    `slots`: int64 `[B*T]`, each token's place among the padded; None where nothing is padded. `boundaries`: int64
    `[M+1]`, the chunks of each of the M rows or documents that have tokens, `full`: int64 `[M]`, which these are, or
    None for all. `rest`: int64 `[M]`, tokens in the last chunk of each. `tail`: int64 `[M,C]`, the tokens of that chunk
    at the right end of a row, -1 for what is before them.
    """

    slots: Tensor | None
    boundaries: Tensor
    full: Tensor | None
    rest: Tensor
    tail: Tensor

    def take(self, u: Tensor) -> Tensor:
        """`[B,T,G]` -> `[G,I,C]`."""
        rows = u.flatten(0, 1)
        if self.slots is not None:
            rows = rows.new_zeros(int(self.boundaries[-1]) * CHUNK, u.shape[2]).index_copy(0, self.slots, rows)
        return rows.unflatten(0, (-1, CHUNK)).permute(2, 0, 1).contiguous()

    def put(self, out: Tensor, shape: torch.Size) -> Tensor:
        """`[G,I,C]` -> `[B,T,G]`."""
        rows = out.flatten(1)
        rows = rows if self.slots is None else rows.index_select(1, self.slots)
        return rows.T.reshape(shape)


def _cut(batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> _Chunks:
    if cu_seqlens is None:
        boundaries, full = torch.arange(batch + 1) * tokens, None
    else:
        boundaries = cu_seqlens.to(device="cpu", dtype=torch.int64)
        full = (boundaries.diff() > 0).nonzero()[:, 0]
        boundaries = torch.cat([boundaries[full], boundaries[-1:]])
    lengths = boundaries.diff()
    counts = (lengths + CHUNK - 1) // CHUNK
    chunks = F.pad(counts.cumsum(0), (1, 0))
    rest = lengths - (counts - 1) * CHUNK
    slots = None
    if not bool((rest == CHUNK).all()):
        slots = (
            torch.arange(int(boundaries[-1])) + (chunks[:-1] * CHUNK - boundaries[:-1]).repeat_interleave(lengths)
        ).to(device)
    place = torch.arange(CHUNK)
    tail = torch.where(place >= CHUNK - rest[:, None], boundaries[1:, None] - CHUNK + place, -1)
    full = None if full is None else full.to(device)
    return _Chunks(slots, chunks.to(device), full, rest.to(device), tail.to(device))


def _states(inputs: Tensor, matrices: _Matrices, chunks: _Chunks, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, complex `[G,I,N]`, and after each row or document, `[B or N, G*N]`."""
    written = matrices.written()  # G C N
    real = torch.view_as_real(written).flatten(2)  # G C 2N
    updates = torch.view_as_complex((inputs @ real).unflatten(2, (-1, 2)))  # G I N
    given = state if chunks.full is None else state[chunks.full]
    added = updates.transpose(0, 1).flatten(1)[None]  # 1 I G*N
    after, _ = diagonal_scan(added, matrices.log_chunk(), initial_state=given, cu_seqlens=chunks.boundaries)
    # The state before a chunk is that after the one before it, or the given one.
    before = torch.cat([given[:1], after[0, :-1]]).index_copy(0, chunks.boundaries[:-1], given)  # I G*N
    last = before[chunks.boundaries[1:] - 1].unflatten(1, matrices.read.shape)  # M G N
    before_it = (chunks.tail < 0)[..., None]
    tokens = u.flatten(0, 1)[chunks.tail.clamp(min=0)].masked_fill(before_it, 0)  # M C G
    new = torch.view_as_complex((tokens.to(inputs.dtype).permute(2, 0, 1) @ real).unflatten(2, (-1, 2)))  # G M N
    decayed = last * matrices.powers[..., chunks.rest].permute(2, 0, 1)
    final = (decayed + new.transpose(0, 1)).flatten(1)
    before = before.unflatten(1, matrices.read.shape).transpose(0, 1)
    return before, final if chunks.full is None else state.index_copy(0, chunks.full, final)
