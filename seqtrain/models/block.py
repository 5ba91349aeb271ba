"""One layer of the model: a mixer over time, then an MLP over channels, each normalised before and added after."""

import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.layers import RMSNorm
from seqtrain.mixers import WHOLE, Mixer, State
from seqtrain.models.spiking import Spikes
from seqtrain.parallel.sequence import SequenceContext


class SwiGLU(nn.Module):
    """`W3 (silu(W1 x) * W2 x)` (Shazeer 2020, arXiv 2002.05202); W1 and W2 are one matrix.

    `spike_rate`: where it is not 0, what enters both matrices is turned into spike counts first (see `Spikes`).
    """

    def __init__(self, width: int, hidden: int, *, spike_rate: float = 0.0):
        super().__init__()
        self.enter = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.leave = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.enter(x)).chunk(2, -1)
        return self.out(self.leave(F.silu(gate) * value))


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    With a `group` the mixer runs on groups of so many tokens, counted from the document's start, which know nothing of
    each other (the linear group RNN of LION, arXiv 2407.18232); 0: on the whole sequence.
    """

    def __init__(self, mixer: Mixer, hidden: int, norm_eps: float, *, group: int = 0, spike_rate: float = 0.0):
        super().__init__()
        width = mixer.shape.width
        self.width, self.hidden, self.group = width, hidden, group
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, hidden, spike_rate=spike_rate)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        """`x: [B,T,D]`, or `[B,D]` for one token per row, and the layer's state -> the same after the block."""
        mix = self._mix_groups if self.group else self._mix
        mixed, state = mix(self.mixer_norm(x), state, sequence)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def _mix(self, x: Tensor, state: State | None, sequence: SequenceContext) -> tuple[Tensor, State]:
        mix = self.mixer if x.dim() == 3 else self.mixer.step
        return mix(x, state, sequence=sequence)

    def _mix_groups(self, x: Tensor, state: State | None, sequence: SequenceContext) -> tuple[Tensor, State]:
        """The mixer's state is that of the unfinished group; the tokens seen, int64 `[B]`, say how far it is."""
        past = dict(state or {})
        seen = past.pop("seen", None)
        tokens = x.shape[1] if x.dim() == 3 else 1
        _, after = sequence.count(seen, x.shape[0], tokens, x.device)
        mixed, state = self._mix(x, past or None, sequence.grouped(self.group, seen))
        return mixed, state | {"seen": after}

    def parameter_count(self) -> int:
        """Mixer, `3 D hidden` of the MLP and two norms."""
        return self.mixer.parameter_count() + 3 * self.width * self.hidden + 2 * self.width

    def flops(self, tokens: int) -> int:
        """Forward pass over one sequence: the mixer's, and `6 T D hidden` of the MLP."""
        whole, rest = divmod(tokens, self.group) if self.group else (0, tokens)
        mixers = whole * self.mixer.flops(self.group) + self.mixer.flops(rest)
        return mixers + 6 * tokens * self.width * self.hidden

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens; in groups, of the longest unfinished group."""
        return self.mixer.state_bytes(self.group - 1) + 8 if self.group else self.mixer.state_bytes(tokens)
