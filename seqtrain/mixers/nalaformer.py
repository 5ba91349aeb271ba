"""NaLaFormer, norm-aware linear attention (2025, arXiv 2506.21137; "Norm x Direction", ICML 2026).

The direction of a query is raised, channel by channel, to a power that grows with its length, so that a long query is
spiky and a short one flat, as under softmax; keys to a fixed one. Each channel becomes two, its positive and its
negative part: channels of opposite sign add nothing, and no weight is negative. Beyond a length of 2 the power hardly
grows: at 16 channels normal queries times 1/4 to 1 changed the entropy by 0.1 nats, longer ones by nothing.
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seqtrain.layers import HeadNorm, Linear, WidthNorm, l2norm, upcast
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.linear import VisionLinearMixer


def query_features(q: Tensor, power: float) -> Tensor:
    """`relu(+-d) ** (power * (1/2 + tanh |q|))` with `d = q / |q|`: `[...,K]` -> `[...,2K]`, in float32 at least."""
    q = upcast(q)
    length = (q.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return _signed_parts(l2norm(q)) ** (power * (0.5 + torch.tanh(length)))


def key_features(k: Tensor, power: float) -> Tensor:
    """`relu(+-k) ** power`, the length with the direction: `[...,K]` -> `[...,2K]`, in float32 at least."""
    return _signed_parts(upcast(k)) ** power


def _signed_parts(x: Tensor) -> Tensor:
    return F.relu(torch.cat([x, -x], -1))


class NaLaFormer(VisionLinearMixer):
    """`out_t = sum_j s_tj v_j / sum_j s_tj`, `s_tj = phi_q(q_t) . phi_k(k_j)`; all heads normalised, gated by SiLU.

    Causal, where the paper's layer sees all tokens of an image. By default a short convolution of q, k and v stands for
    positions, which `rope`, `lepe` and `conv_width=0` make the paper's.
    """

    class Config(VisionLinearMixer.Config):
        # Power of keys; that of queries goes from a half of it (no length) to one and a half of it (great length).
        power: Annotated[float, Field(ge=2, le=8)] = 3.0
        # What is normalised before the gate: all heads together by mean and variance (width), as in the paper, or each
        # by its root mean square (head).
        norm_over: Literal["width", "head"] = "width"

    rotated_parts: ClassVar[int] = 2

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.gate = Linear(shape.width, self.inner, bias=False)
        wide = config.norm_over == "width"
        self.norm = WidthNorm(self.inner, learned=True, tensor=shape.tensor) if wide else HeadNorm(self.value)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        (q, k, v), after = self.qkv(x, past.get("conv"), sequence)
        q, k = query_features(q, self.config.power), key_features(k, self.config.power)
        weighted, weight, memory = self.weigh(q, k, v, past, sequence, scale=1.0)
        # No weight at all only where no channel of a query meets one of its own sign: then the numerator is 0, too.
        out, local = self.with_local(weighted / weight.clamp(min=1e-12), v, past, sequence)
        gate = self.gate(x)
        out = self.norm(out, gate) if isinstance(self.norm, HeadNorm) else self.norm(out) * F.silu(upcast(gate))
        return self.out(out.to(x.dtype)), after | memory | local
