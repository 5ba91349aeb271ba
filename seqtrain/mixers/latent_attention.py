"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv 2405.04434, section 2.1)."""

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from seqtrain.kernels import softmax_attention
from seqtrain.layers import Linear, RMSNorm, fused, positions, rotate
from seqtrain.mixers import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.attention import attend


class LatentAttention(Mixer):
    """Softmax attention whose keys and values are made of one narrow latent: `[k_h, v_h] = W_h norm(W_c x)`.

    A second part of the keys, rotated by position, is made of x and shared by all heads. The state holds the keys and
    values of every head, as wide as they are read, and not the latent.
    """

    class Config(MixerConfig):
        # Channels of the latent that keys and values are made of; 0: of four heads.
        rank: NonNegativeInt = 0
        # Channels of the latent that queries are made of; 0: they are made of the layer's input.
        query_rank: NonNegativeInt = 0
        # Channels of a head's own keys; 0: model.width / model.heads.
        key_width: NonNegativeInt = 0
        # Channels of the keys that all heads share, which positions rotate; 0: half of a head's own.
        shared_width: NonNegativeInt = 0
        # Channels of a head's values; 0: as many as of its own keys.
        value_width: NonNegativeInt = 0
        # False: positions rotate nothing (Kimi Linear).
        rotary: bool = True
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0
        # Factors on the wavelengths, one per pair of shared channels; empty for 1 everywhere.
        rope_stretch: tuple[float, ...] = ()
        # Factor on rotated queries and keys alike.
        rope_amplitude: PositiveFloat = 1.0
        # Factor on scores before the softmax; 0: one over the root of a head's channels, the shared ones among them.
        scale: NonNegativeFloat = 0.0
        # True: what makes latents and what leaves the layer have biases.
        bias: bool = False
        # True: what a head reads is multiplied by a sigmoid of a projection of the layer's input, one number (Ling 3).
        output_gate: bool = False

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = config.key_width or self.part_of_width()
        self.value = config.value_width or self.key
        self.shared = config.shared_width or self.key // 2
        self.rank = config.rank or 4 * self.key
        if config.rotary and self.shared % 2:
            raise self.config_error("shared_width", self.shared, "the rotation needs an even number of channels")
        if config.rope_stretch and len(config.rope_stretch) != self.shared // 2:
            came = f"[{len(config.rope_stretch)} numbers]"
            raise self.config_error("rope_stretch", came, f"{self.shared} shared channels have {self.shared // 2}")
        heads, width, rank = shape.heads, shape.width, config.query_rank
        query = heads * (self.key + self.shared)
        last = fused(Linear(rank or width, query, bias=False), heads * (self.key + self.shared,), (query,))
        first = (Linear(width, rank, bias=config.bias), RMSNorm(rank)) if rank else ()
        self.query = nn.Sequential(*first, last)
        self.latent = fused(Linear(width, self.rank + self.shared, bias=config.bias), (self.rank, self.shared))
        self.norm = RMSNorm(self.rank)
        keys_and_values = Linear(self.rank, heads * (self.key + self.value), bias=False)
        # Of one head after the other, so that each rank's are neighbors.
        self.expand = fused(keys_and_values, heads * (self.key, self.value), (keys_and_values.out_features,))
        self.gate = Linear(width, heads, bias=False) if config.output_gate else None
        self.out = self.output(heads * self.value, bias=config.bias)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        place, position = positions(x, past.get("position"), sequence)
        q, q_shared = self.query(x).unflatten(2, (self.shape.heads, -1)).split([self.key, self.shared], 3)
        latent, k_shared = self.latent(x).split([self.rank, self.shared], 2)
        k, v = self.expand(self.norm(latent)).unflatten(2, (self.shape.heads, -1)).split([self.key, self.value], 3)
        q = torch.cat([q, self.rotated(q_shared, place)], 3)  # B T H K+shared
        k_shared = self.rotated(k_shared[:, :, None], place)  # B T 1 shared
        k = torch.cat([k, k_shared.expand(-1, -1, self.shape.heads, -1)], 3)
        scale = self.config.scale or None
        out, after = attend(sequence, softmax_attention, q, k, v, past=past, scale=scale)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))[..., None]
        return self.out(out.flatten(2)), after | {"position": position}

    def rotated(self, heads: Tensor, place: Tensor) -> Tensor:
        """The shared channels of queries or keys, `[B,T,...,shared]`, turned by their positions."""
        config = self.config
        if not config.rotary:
            return heads
        return rotate(heads, place, config.rope_base, stretch=config.rope_stretch, amplitude=config.rope_amplitude)
