"""Lightning attention as MiniMax-01 has it (2025, arXiv 2501.08313, section 2.2; from arXiv 2401.04658)."""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor

from seqtrain.kernels import linear_attention
from seqtrain.layers import HeadNorm, HeadProjections, Linear
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


class LightningAttention(Mixer):
    """`S_t = a S_{t-1} + k_t^T v_t`, read by `q_t S_t`: q, k and v are what SiLU makes of projections.

    Head h of H in layer l of L forgets by the fixed factor `a = exp(-2 ** (-8 (h + 1) / H) * (1 - l / (L - 1)))`, so
    the last layer forgets hardly anything. All heads together are normalised, then gated by a sigmoid.
    """

    class Config(MixerConfig):
        # Channels of a head; 0: model.width / model.heads.
        head_width: NonNegativeInt = 0

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.head = config.head_width or self.part_of_width()
        inner = shape.heads * self.head
        self.qkv = HeadProjections(shape.width, shape.heads, 3 * (self.head,))
        self.gate = Linear(shape.width, inner, bias=False)
        self.norm = HeadNorm(inner, "sigmoid", tensor=shape.tensor)
        self.out = self.output(inner)

    def log_decay(self, device: torch.device) -> Tensor:
        """The logarithm of each head's decay: float32 `[H]`."""
        heads, index, depth = self.shape.all_heads, self.shape.index, self.shape.depth
        power = 8 / heads * torch.arange(1, heads + 1, dtype=torch.float32, device=device)
        # Of one layer and of the last the decay is not quite 1, as in the authors' code.
        power = self.shape.tensor.own(power)
        return -torch.exp2(-power) * (1 - index / (depth - 1 + 1e-5) + 1e-5)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        projected, after = self.qkv(x, None, sequence)
        q, k, v = (F.silu(part) for part in projected)
        decay = self.log_decay(x.device)
        out, after["memory"] = sequence.run(
            linear_attention, q, k, v, decay, scale=1.0, initial_state=past.get("memory")
        )
        # The norm of all heads is that of one as wide as all.
        return self.out(self.norm(out.flatten(2)[:, :, None], self.gate(x))), after
