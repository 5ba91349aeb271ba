"""Softmax attention with grouped heads and rotary positions: what the full and the windowed mixer share."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.kernels import softmax_attention
from seqtrain.layers import RMSNorm, positions, rotate
from seqtrain.mixers.common.base import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State


def attend(
    sequence: SequenceContext, operator: Callable, *tensors: Tensor, past: Past, prefix: str = "", **options: Any
) -> tuple[Tensor, State]:
    """Softmax attention whose part of a mixer's state has names that begin with `prefix`: its output and that part."""
    names = ("k", "v", "sink_k", "sink_v", "length")
    held = {name: past[prefix + name] for name in names if prefix + name in past}
    out, kept = sequence.run(operator, *tensors, initial_state=held or None, **options)
    return out, {prefix + name: tensor for name, tensor in kept.items()}


class SoftmaxAttention(Mixer):
    """`out_t = sum_s softmax(q_t k_s / sqrt(K)) v_s` over past tokens, rotated by position (RoPE)."""

    class Config(MixerConfig):
        # Query heads that share one key and value head (grouped-query attention); must divide model.heads. 1: none.
        query_group: PositiveInt = 1
        # Base of the rotation's wavelengths, in tokens.
        rope_base: Annotated[float, Field(gt=1)] = 10000.0
        # Factors on the wavelengths, one per pair of channels; empty for 1 everywhere.
        rope_stretch: tuple[float, ...] = ()
        # Factor on rotated queries and keys alike.
        rope_amplitude: PositiveFloat = 1.0
        # True: queries and keys are normalised by their root mean square per head, before the rotation.
        qk_norm: bool = False
        # Added to the mean square in that norm.
        norm_eps: PositiveFloat = 1e-6
        # Channels of a head; 0: model.width / model.heads.
        head_width: NonNegativeInt = 0
        # True: queries, keys and values have a bias.
        qkv_bias: bool = False

    # Keys a query sees, its own included; None for all.
    window: int | None = None
    # What an ablation leaves out of a converted layer: a part's name, or nothing.
    without: Literal["", "memory", "window"] = ""

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = config.head_width or self.part_of_width()
        if self.key % 2:
            field, value = ("head_width", config.head_width) if config.head_width else ("rope_base", config.rope_base)
            raise self.config_error(field, value, f"a head has {self.key} channels, which the rotation needs even")
        if config.rope_stretch and len(config.rope_stretch) != self.key // 2:
            came = f"[{len(config.rope_stretch)} numbers]"
            raise self.config_error("rope_stretch", came, f"a head of {self.key} channels has {self.key // 2}")
        if shape.heads % config.query_group:
            raise self.config_error("query_group", config.query_group, f"must divide model.heads={shape.heads}")
        self.groups = shape.heads // config.query_group
        self.channels = [count * self.key for count in (shape.heads, self.groups, self.groups)]
        self.qkv = nn.Linear(shape.width, sum(self.channels), bias=config.qkv_bias)
        self.q_norm = RMSNorm(self.key, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.key, config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(shape.heads * self.key, shape.width, bias=False)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        q, k, v = self.project(x)
        place, position = positions(x, past.get("position"), sequence)
        out, after = self.attention(q, k, v, place, past, sequence)
        return self.out(out.flatten(2)), after | {"position": position}

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        """What queries read, `[B,T,H,K]`, and the state but for positions; q and k are not yet rotated by `place`."""
        q, k = self.rotated(q, place), self.rotated(k, place)
        return attend(sequence, softmax_attention, q, k, v, past=past, window=self.window)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x: [B,T,D]` -> q `[B,T,H,K]`, k and v `[B,T,G,K]`; normalised where so configured, not yet rotated."""
        q, k, v = (part.unflatten(2, (-1, self.key)) for part in self.qkv(x).split(self.channels, 2))
        return self.q_norm(q), self.k_norm(k), v

    def rotated(self, heads: Tensor, place: Tensor) -> Tensor:
        """Queries or keys `[B,T,...,K]` turned by their positions, int64 `[B or 1, T]`."""
        config = self.config
        return rotate(heads, place, config.rope_base, stretch=config.rope_stretch, amplitude=config.rope_amplitude)
