"""TCNCA (Terzic et al. 2023, arXiv 2312.05605): a dilated temporal convolution, then gated attention within chunks.

MEGA (arXiv 2209.10655) with its moving average replaced by the convolution; without that one's biases, and with as many
heads as the model has, where MEGA has one.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize, normal
from seqtrain.kernels import softmax_attention
from seqtrain.layers import Linear, ShortConvolution, fused, positions, rotate
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend


class TCNCA(Mixer):
    """`c = TCN(x)`, `z = silu(W_z c)`, `o = attention(z, z, v)` in chunks, `y = u (silu(W_h c + W (g o)) - s)`.

    `u = sigmoid(W_f c)`, and s is the residual stream that y is added to, which so becomes `(1 - u) s + u silu(...)`.

    The convolution is `depth` residual layers `x + silu(w * x)`, one filter per channel, layer l dilated by
    `dilation ** l`: a token sees the last `1 + (W-1) (dilation^depth - 1) / (dilation - 1)`. q and k are z scaled and
    shifted per channel; `v = silu(W_v x)`, `g = silu(W_g c)`. A token attends to the tokens of its own chunk up to
    itself, chunks being counted from the document's start, with positions rotated.
    """

    class Config(MixerConfig):
        # Tokens in a chunk.
        chunk: Annotated[int, Field(gt=1)] = 128
        # Tokens under the filters of a layer of the convolution.
        conv_width: Annotated[int, Field(ge=2, le=64)] = 5
        # Layers of the convolution.
        conv_depth: Annotated[int, Field(gt=0, le=16)] = 3
        # How many times wider each layer's filters reach than those of the one before.
        dilation: PositiveInt = 4
        # Channels of queries and of keys over model.width, all heads together.
        expand_key: PositiveFloat = 0.5
        # Value channels over model.width, all heads together.
        expand_value: PositiveFloat = 2.0
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0
        # What becomes of the stream: u takes its place in part (gated), as in MEGA, or the block adds to it (plain).
        residual: Literal["gated", "plain"] = "gated"

    grouped = True

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = self.part_of_width(config.expand_key, "expand_key")
        self.value = self.part_of_width(config.expand_value, "expand_value")
        if self.key % 2:
            rule = f"times model.width={shape.width} over model.heads={shape.heads} must be even for the rotation"
            raise self.config_error("expand_key", config.expand_key, rule)
        width, keys, inner = shape.width, shape.heads * self.key, shape.heads * self.value
        self.channels = channels = shape.channels
        self.convs = nn.ModuleList(
            ShortConvolution(width, config.conv_width, dilation=config.dilation**layer)
            for layer in range(config.conv_depth)
        )
        self.v = Linear(width, inner, bias=False)
        rows = (keys, -inner, channels, -channels)
        self.parts = fused(Linear(width, keys + inner + 2 * channels, bias=False), rows)  # of c: z, g, h, f
        self.scales = nn.Parameter(torch.empty(2 * keys))
        self.shifts = nn.Parameter(torch.empty(2 * keys))
        self.tensor_parts = {"scales": (0, (keys, keys)), "shifts": (0, (keys, keys))}
        self.out = self.output(inner)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.scales: normal(0.02), self.shifts: constant(0.0)}

    def mix_into(self, stream: Tensor, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        after: State = {}
        c = x
        for layer, conv in enumerate(self.convs):
            name = f"conv{layer}"
            mixed, after[name] = conv(c, past.get(name), sequence)
            c = c + mixed
        keys, inner = len(self.scales) // 2, self.shape.heads * self.value
        z, gate, candidate, update = self.parts(c).split([keys, inner, self.channels, self.channels], 2)
        qk = F.silu(z).repeat(1, 1, 2) * self.scales + self.shifts  # B T 2*H*K
        seen = past.get("position")
        place, after["position"] = positions(x, seen, sequence)
        q, k = (rotate(part.unflatten(2, (-1, self.key)), place, self.config.rope_base) for part in qk.chunk(2, 2))
        v = F.silu(self.v(x)).unflatten(2, (-1, self.value))
        chunks = sequence.grouped(self.config.chunk, seen)
        out, kept = attend(chunks, softmax_attention, q, k, v, past=past, window=None)
        tensor = self.shape.tensor
        mixed = tensor.own(tensor.enter(self.out(F.silu(gate) * out.flatten(2))))
        y = F.silu(candidate + mixed)
        if self.config.residual == "gated":
            y = y - tensor.own(stream)
        return tensor.join(torch.sigmoid(update) * y), after | kept
