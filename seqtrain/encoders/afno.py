"""AFNO (Guibas et al. 2021, arXiv 2111.13587): a document's Fourier modes pass through one small MLP each.

On an image the transform has two dimensions, here one. Over ranks tokens are exchanged for channels and back.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.initialization import Initializer, constant, initialize, normal
from seqtrain.layers import upcast
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.parallel.both_ways import BothWays


class AFNO(Mixer):
    """`y = x + IFFT(shrink(W2 relu(W1 FFT(x) + b1) + b2))`, W1 and W2 complex and block-diagonal.

    `shrink` takes `threshold` off real and imaginary parts (soft threshold), which leaves few modes.
    """

    causal = False
    out: Any

    class Config(MixerConfig):
        # Blocks of the matrices; must divide model.width.
        blocks: Annotated[int, Field(gt=0)] = 8
        # Hidden channels of a block over its channels.
        expand: Annotated[float, Field(gt=0)] = 1.0
        # What is taken off the modes' parts.
        threshold: NonNegativeFloat = 0.01

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        if shape.width % config.blocks:
            raise self.config_error("blocks", config.blocks, f"must divide model.width={shape.width}")
        self.blocks = shape.share(config.blocks, f"mixer.afno.blocks={config.blocks}")
        size = shape.width // config.blocks
        hidden = max(1, round(config.expand * size))
        # Real and imaginary parts, last.
        self.up = nn.Parameter(torch.empty(self.blocks, size, hidden, 2))
        self.down = nn.Parameter(torch.empty(self.blocks, hidden, size, 2))
        self.up_bias = nn.Parameter(torch.empty(self.blocks * hidden * 2))
        self.down_bias = nn.Parameter(torch.empty(self.blocks * size * 2))
        # There is no projection into the stream.
        self.out = None
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        biases: dict[Tensor, Initializer] = dict.fromkeys((self.up_bias, self.down_bias), constant(0.0))
        return biases | dict.fromkeys((self.up, self.down), normal(0.02))

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        assert isinstance(sequence, BothWays)
        tensor, (rank, ranks) = self.shape.tensor, sequence.channel_part
        if self.blocks % ranks:
            raise ConfigError(f"mixer.afno.blocks={self.config.blocks}: ranks of a sequence divide them; {ranks} can't")
        own = upcast(tensor.own(x))
        rows = sequence.by_channels(own)
        part = slice(rank * self.blocks // ranks, (rank + 1) * self.blocks // ranks)
        filtered = torch.cat([self._filter(rows[:, document], part) for document in sequence.documents()], 1)
        return tensor.join((own + sequence.by_tokens(filtered)).to(x.dtype)), {}

    def _filter(self, x: Tensor, part: slice) -> Tensor:
        """Of one document of some blocks, `[B,T,blocks * size]`."""
        if x.shape[1] == 0:
            return x
        modes = torch.fft.rfft(x, dim=1, norm="ortho").unflatten(2, (part.stop - part.start, -1))
        up, down = (torch.view_as_complex(upcast(weight[part])) for weight in (self.up, self.down))
        biases = (bias.view(self.blocks, -1, 2)[part] for bias in (self.up_bias, self.down_bias))
        up_bias, down_bias = (torch.view_as_complex(upcast(bias)) for bias in biases)
        hidden = torch.view_as_real(torch.einsum("btns,nsh->btnh", modes, up) + up_bias)
        hidden = torch.view_as_complex(F.relu(hidden))
        passed = torch.view_as_real(torch.einsum("btnh,nhs->btns", hidden, down) + down_bias)
        passed = torch.view_as_complex(F.softshrink(passed, self.config.threshold))
        return torch.fft.irfft(passed.flatten(2), n=x.shape[1], dim=1, norm="ortho")
