"""One layer of the model: a mixer over time, then an MLP over channels, each normalised before and added after."""

import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.mixers import WHOLE, Mixer, State
from seqtrain.mixers._parts import RMSNorm
from seqtrain.parallel.sequence import Sequence


class SwiGLU(nn.Module):
    """`W3 (silu(W1 x) * W2 x)` (Shazeer 2020, arXiv 2002.05202); W1 and W2 are one matrix."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, mixer: Mixer, hidden: int, norm_eps: float):
        super().__init__()
        width = mixer.shape.width
        self.width, self.hidden = width, hidden
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Tensor, state: State | None = None, *, sequence: Sequence = WHOLE) -> tuple[Tensor, State]:
        """`x: [B,T,D]`, or `[B,D]` for one token a row, and the mixer's state -> the same after the block."""
        mix = self.mixer if x.dim() == 3 else self.mixer.step
        mixed, state = mix(self.mixer_norm(x), state, sequence=sequence)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def parameter_count(self) -> int:
        """Mixer, `3 D hidden` of the MLP and two norms."""
        return self.mixer.parameter_count() + 3 * self.width * self.hidden + 2 * self.width

    def flops(self, tokens: int) -> int:
        """Forward pass over one sequence: the mixer's, and `6 T D hidden` of the MLP."""
        return self.mixer.flops(tokens) + 6 * tokens * self.width * self.hidden
