"""Softmax attention with grouped heads and rotary positions: what the full and the windowed mixer share."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.initialization import Initializer, initialize, normal
from seqtrain.kernels import softmax_attention
from seqtrain.layers import Adapters, Linear, RMSNorm, fused, positions, rotate, upcast
from seqtrain.mixers.common.base import LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.mixers.common.take_over import Projections, copy_projections, fused_projections, heads_of, rows_of


def attend(
    sequence: SequenceContext, operator: Callable, *tensors: Tensor, past: Past, prefix: str = "", **options: Any
) -> tuple[Tensor, State]:
    """Softmax attention whose part of a mixer's state has names that begin with `prefix`: its output and that part."""
    names = ("k", "v", "sink_k", "sink_v", "length")
    held = {name: past[prefix + name] for name in names if prefix + name in past}
    out, kept = sequence.run(operator, *tensors, initial_state=held or None, **options)
    return out, {prefix + name: tensor for name, tensor in kept.items()}


class LearnedSinks(nn.Module):
    """Keys and values that every query sees, whatever the text: one more entry of a softmax, see `sink_attention`."""

    def __init__(self, count: int, groups: int, width: int):
        """`count`: of each of `groups` key heads, of `width` channels."""
        super().__init__()
        self.groups, self.count = groups, count
        # One-dimensional, so that weight decay skips them.
        self.keys = nn.Parameter(torch.empty(groups * count * width))
        self.values = nn.Parameter(torch.empty(groups * count * width))
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.keys: normal(0.02), self.values: normal(0.02)}

    def forward(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """For queries `[B,T,H,K]` the logarithm of their weights' sum, `[B,T,H]`, and the mean value, `[B,T,H,K]`."""
        keys, values = (upcast(part).view(self.groups, self.count, -1) for part in (self.keys, self.values))
        asked = upcast(q).unflatten(2, (self.groups, -1))  # B T G H/G K
        scores = scale * torch.einsum("btghk,gsk->btghs", asked, keys)
        read = torch.einsum("btghs,gsk->btghk", scores.softmax(-1), values)
        return scores.logsumexp(-1).flatten(2), read.flatten(2, 3)


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
        # True: what leaves the layer has one.
        out_bias: bool = False
        # Channels of a head that positions rotate, the first ones; null: all, 0: none (no positions).
        rope_width: NonNegativeInt | None = None
        # What the norm of queries and keys is taken over: each head, or all heads together.
        qk_norm_over: Literal["head", "all"] = "head"
        # True: that norm multiplies by 1 + weight (Gemma).
        qk_norm_zero_centered: bool = False
        # True: what heads read is multiplied by a sigmoid of a projection of the layer's input (Qwen3-Next).
        output_gate: bool = False
        # Factor on scores before the softmax; 0: one over the root of a head's channels.
        scale: NonNegativeFloat = 0.0
        # What these scores stay below in size, softly (Gemma 2); 0: unbounded.
        score_cap: NonNegativeFloat = 0.0
        # Keys that a head reads where single tokens are decoded, those whose first predict_width channels score highest
        # (Spark); 0: all.
        kept_keys: NonNegativeInt = 0
        # Channels of a head that say which keys are read; 0: half of them.
        predict_width: NonNegativeInt = 0
        # Rank of what is added to each projection where layers share these (Zamba2); 0: nothing.
        adapter_rank: NonNegativeInt = 0

    # Keys a query sees, its own included; None for all.
    window: int | None = None
    # What an ablation leaves out of a converted layer: a part's name, or nothing.
    without: Literal["", "memory", "window"] = ""

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.key = config.head_width or self.part_of_width()
        self.check_rotation()
        if shape.all_heads % config.query_group:
            raise self.config_error("query_group", config.query_group, f"must divide model.heads={shape.all_heads}")
        # Key heads of all ranks. Where these are fewer than ranks, each rank makes a part of a head, see `joined`.
        self.all_groups = shape.all_heads // config.query_group
        self.groups = self.key_heads()
        inner, keys = shape.heads * self.key, shape.share(self.all_groups * self.key, f"{self.all_groups} key heads")
        # Of queries, keys, values and, where there is one, the gate.
        self.channels = [inner, keys, keys, *config.output_gate * (inner,)]
        width = min(self.key, keys)
        rows = [*shape.heads * (self.key,), *2 * (keys // width) * (width,), *config.output_gate * (-inner,)]
        self.qkv = fused(Linear(shape.width, sum(self.channels), bias=config.qkv_bias), rows, self.channels)
        self.adapter = Adapters(shape.width, self.channels, config.adapter_rank) if config.adapter_rank else None
        self.q_norm, self.k_norm = self.norm(inner), self.norm(keys)
        self.out = self.output(inner, bias=config.out_bias)

    def key_heads(self) -> int:
        """Key heads that this rank's queries read. Raises `ConfigError`."""
        ranks = self.shape.tensor.count
        if self.all_groups < ranks and ranks % self.all_groups == 0:
            return 1
        return self.shape.share(self.all_groups, f"{self.all_groups} key heads of model.heads={self.shape.all_heads}")

    def joined(self, x: Tensor) -> Tensor:
        """This rank's part of keys or values, `[B,T,...]`, as the whole heads that its queries read, `[B,T,G,K]`."""
        tensor, heads = self.shape.tensor, (-1, self.key)
        if self.all_groups >= tensor.count:
            return x.unflatten(2, heads)
        head = tensor.rank * self.all_groups // tensor.count
        return tensor.enter(tensor.join(x)).unflatten(2, heads)[:, :, head : head + 1]

    def check_rotation(self) -> None:
        """Raises `ConfigError` where positions can't rotate a head's channels."""
        config, field = self.config, "head_width" if self.config.head_width else "rope_base"
        width = self.key if config.rope_width is None else config.rope_width
        if config.rope_width is not None and width > self.key:
            raise self.config_error("rope_width", width, f"a head has {self.key} channels")
        if width % 2:
            field = field if config.rope_width is None else "rope_width"
            rule = f"a head has {width} channels, which the rotation needs even"
            raise self.config_error(field, getattr(config, field), rule)
        if config.rope_stretch and len(config.rope_stretch) != width // 2:
            came = f"[{len(config.rope_stretch)} numbers]"
            raise self.config_error("rope_stretch", came, f"a head of {width} channels has {width // 2}")

    def norm(self, channels: int) -> nn.Module:
        """That of queries or keys, of which this rank has so many channels."""
        config = self.config
        if not config.qk_norm:
            return nn.Identity()
        options: dict[str, Any] = {"zero_centered": config.qk_norm_zero_centered}
        if config.qk_norm_over == "head":
            return RMSNorm(self.key, config.norm_eps, **options)
        return RMSNorm(channels, config.norm_eps, tensor=self.shape.tensor, **options)

    def projections(self) -> Projections:
        return fused_projections("qkv.weight", self.channels[:3])

    @torch.no_grad()
    def init_from_attention(self, attention: Any) -> None:
        """Another layer of softmax attention, exactly where both or neither normalise queries and keys.

        A gate that the other has not begins at one half, which the output makes up for; norms that it has not, at the
        size that its queries and keys have for an input of variance 1.
        """
        copy_projections(self, attention)
        for mine, theirs in ((self.qkv, attention.qkv), (self.out, attention.out)):
            if mine.bias is not None:
                mine.bias.zero_()
                if theirs.bias is not None:
                    mine.bias[: len(theirs.bias)] = theirs.bias
        if self.config.output_gate:
            self.qkv.weight[sum(self.channels[:3]) :] = 0
            self.out.weight.mul_(2)
        for name in ("q", "k"):
            mine, theirs = (getattr(each, f"{name}_norm") for each in (self, attention))
            if isinstance(mine, RMSNorm):
                if isinstance(theirs, RMSNorm):
                    scale = theirs.weight + float(theirs.zero_centered)
                else:
                    scale = heads_of(rows_of(attention, name), self.key).square().sum(-1).mean().sqrt()
                mine.weight.copy_(scale - float(mine.zero_centered))

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        q, k, v, *gate = self.project(x)
        place, position = positions(x, past.get("position"), sequence)
        out, after = self.attention(q, k, v, place, past, sequence)
        return self.read_out(out, gate), after | {"position": position}

    def read_out(self, out: Tensor, gate: Sequence[Tensor]) -> Tensor:
        """What leaves the layer, `[B,T,D]`, of what heads read, `[B,T,H,K]`, and of the gate where there is one."""
        out = out.flatten(2)
        for each in gate:
            out = out * torch.sigmoid(each)
        return self.out(out)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, place: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, State]:
        """What queries read, `[B,T,H,K]`, and the state but for positions; q and k are not yet rotated by `place`."""
        q, k = self.rotated(q, place), self.rotated(k, place)
        config = self.config
        options: dict[str, Any] = {"window": self.window, "scale": config.scale or None, "score_cap": config.score_cap}
        if config.kept_keys and self.window is None and not (sequence.sends or self.shape.encoder):
            options |= {"kept_keys": config.kept_keys, "predict_width": config.predict_width or self.key // 2}
        return attend(sequence, softmax_attention, q, k, v, past=past, **options)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x: [B,T,D]` -> q `[B,T,H,K]`, k and v `[B,T,G,K]`, and a gate `[B,T,H*K]` where there is one.

        Queries and keys are normalised where so configured, and not yet rotated.
        """
        projected = self.qkv(x) if self.adapter is None else self.qkv(x) + self.adapter(x)
        q, k, v, *gate = projected.split(self.channels, 2)
        heads = (-1, self.key)
        if self.config.qk_norm_over == "all":
            q, k = self.q_norm(q).unflatten(2, heads), self.joined(self.k_norm(k))
        else:
            q, k = self.q_norm(q.unflatten(2, heads)), self.k_norm(self.joined(k))
        return q, k, self.joined(v), *gate

    def rotated(self, heads: Tensor, place: Tensor) -> Tensor:
        """Queries or keys `[B,T,...,K]` turned by their positions, int64 `[B or 1, T]`."""
        config = self.config
        if config.rope_width == 0:
            return heads
        options = {"stretch": config.rope_stretch, "amplitude": config.rope_amplitude, "width": config.rope_width}
        return rotate(heads, place, config.rope_base, **options)
