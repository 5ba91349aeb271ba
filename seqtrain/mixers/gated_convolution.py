"""Gated short convolution: the recurrent layer of LFM2 (Liquid AI 2025, arXiv 2511.23404, section 2)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from seqtrain.layers import Linear, ShortConvolution, fused
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


class GatedConvolution(Mixer):
    """`y = W (c * conv(b * v))`, where b, c and v are projections of the layer's input."""

    class Config(MixerConfig):
        # Tokens under the convolution.
        conv_width: Annotated[int, Field(ge=2, le=16)] = 3
        # True: both projections and the convolution have a bias.
        bias: bool = False

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        rows = (-shape.channels, -shape.channels, shape.channels)
        self.parts = fused(Linear(shape.width, 3 * shape.channels, bias=config.bias), rows)  # b, c, v
        self.conv = ShortConvolution(shape.channels, config.conv_width, bias=config.bias, activation="none")
        self.out = self.output(shape.channels, bias=config.bias)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        enter, leave, v = self.parts(x).chunk(3, 2)
        mixed, conv = self.conv(enter * v, past.get("conv"), sequence)
        return self.out(leave * mixed), {"conv": conv}
