"""Qwen3-Next and Qwen3.5: Gated DeltaNet and gated softmax attention, with an MLP or with experts."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    Piece,
    activation,
    attention_keys,
    attention_of,
    common_keys,
    delta_fields,
    delta_keys,
    feed_forward_pieces,
    head_width,
    heads_of,
    interleaved,
    network,
    outer_pieces,
    plain,
    recurrent_but_in,
    rotation,
)
from seqtrain.models.families.dense import FULL
from seqtrain.models.feed_forward import RouterConfig
from seqtrain.models.language_model import LanguageModel

DELTA = "gated_delta_net"


@dataclass(frozen=True)
class Qwen(Family):
    """`fused`: projections of a DeltaNet layer are two matrices, interleaved by key head (Qwen3-Next).

    `prefix`: before the names of the text model's tensors.
    """

    fused: bool = False
    prefix: str = field(default="model.", kw_only=True)

    def architecture(self, config: Any, where: object) -> Architecture:
        _, shared, head = heads_of(config, where)
        layers = [DELTA if kind == "linear_attention" else FULL for kind in config.layer_types]
        attention = MIXERS.get(FULL).Config(
            query_group=shared,
            head_width=head,
            qk_norm=True,
            qk_norm_zero_centered=True,
            norm_eps=config.rms_norm_eps,
            output_gate=True,
            qkv_bias=bool(config.attention_bias),
            out_bias=bool(config.attention_bias),
            **rotation(config, where, head),
        )
        delta = MIXERS.get(DELTA).Config(
            **delta_fields(config),
            norm_eps=config.rms_norm_eps,
        )
        others = {"norm_zero_centered": True, "activation": activation(config, where), **self.experts(config)}
        return network(config, where, layers, {FULL: attention, DELTA: delta}, **others)

    def hybrid_of(self, teacher: Architecture, kept: Collection[int]) -> Architecture:
        """Gated DeltaNet whose heads are those of attention, each with a key of its own."""
        model, softmax, key = teacher.model, attention_of(teacher), head_width(teacher)
        if len(set(kept)) == model.depth:
            raise ConfigError("it needs a layer of Gated DeltaNet; keep fewer layers")
        delta = MIXERS.get(DELTA).Config(
            heads=model.heads, key_heads=model.heads, key_width=key, value_width=key, norm_eps=model.norm_eps
        )
        bias = softmax.qkv_bias or softmax.out_bias
        changed = {"qk_norm": True, "qk_norm_zero_centered": True, "output_gate": True, "norm_eps": model.norm_eps}
        attention = replace(softmax, qkv_bias=bias, out_bias=bias, **changed)
        return recurrent_but_in(teacher, kept, DELTA, delta, attention, norm_zero_centered=True)

    def config_of(self, model: LanguageModel) -> dict[str, Any]:
        config = model.config
        delta = {key: value for key, value in delta_keys(model).items() if key != "linear_allow_neg_eigval"}
        if FULL in config.layers:
            attention = attention_keys(model)
            # Without it these configs rotate a quarter of a head.
            attention["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        else:
            attention = {"num_key_value_heads": config.heads, "head_dim": delta["linear_key_head_dim"]}
        keys = {**common_keys(model), **attention, **delta, "num_experts": config.experts}
        if not config.experts:
            return keys
        return keys | {
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_width or config.hidden,
            "shared_expert_intermediate_size": config.shared_expert_width,
            "norm_topk_prob": config.router.normalize,
            "mlp_only_layers": [index for index in range(config.depth) if config.mlp(index) == "mlp"],
        }

    def experts(self, config: Any) -> dict[str, Any]:
        """What the network has of a mixture of experts."""
        experts = getattr(config, "num_experts", 0) or 0
        if not experts:
            return {}
        dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
        kinds = [
            "moe" if index not in dense and (index + 1) % step == 0 else "mlp"
            for index in range(config.num_hidden_layers)
        ]
        return {
            "mlps": tuple(kinds),
            "experts": experts,
            "experts_per_token": config.num_experts_per_tok,
            "expert_width": config.moe_intermediate_size,
            "shared_expert_width": config.shared_expert_intermediate_size,
            "router": RouterConfig(normalize=bool(getattr(config, "norm_topk_prob", True)), shared_gate=True),
        }

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model, self.prefix)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"{self.prefix}layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            if config.layer_types[index] == "linear_attention":
                yield from self.delta_pieces(f"{theirs}.linear_attn", f"{ours}.mixer", block.mixer)
            else:
                yield from gated_attention_pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", block.mlp_norm)
            yield from feed_forward_pieces(f"{theirs}.mlp", f"{ours}.mlp", block.mlp)

    def delta_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        """A Gated DeltaNet layer."""
        fused = fused_delta_pieces if self.fused else separate_delta_pieces
        yield from fused(theirs, ours, mixer)
        yield from plain(f"{theirs}.conv1d", f"{ours}.qkv.conv", mixer.qkv.conv, lifted=True)
        yield from plain(f"{theirs}.norm", f"{ours}.norm.norm", mixer.norm.norm)
        yield from plain(f"{theirs}.out_proj", f"{ours}.out", mixer.out)
        yield Piece(f"{theirs}.A_log", f"{ours}.rate_log")
        yield Piece(f"{theirs}.dt_bias", f"{ours}.step_bias")


def separate_delta_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """The projections of a DeltaNet layer where each is a matrix of its own."""
    yield from plain(f"{theirs}.in_proj_qkv", f"{ours}.qkv.linear", mixer.qkv.linear)
    for name, own in (("in_proj_z", "gate"), ("in_proj_b", "beta"), ("in_proj_a", "decay")):
        yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))


def fused_delta_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """The same where each key head has its query, key, values and gates one after the other."""
    heads, times = mixer.key_heads, mixer.shape.heads // mixer.key_heads
    rows = interleaved({"q": mixer.key, "k": mixer.key, "v": times * mixer.value, "z": times * mixer.value}, heads)
    first = 0
    for part in ("q", "k", "v"):
        place = slice(first, first + len(rows[part]))
        yield Piece(f"{theirs}.in_proj_qkvz.weight", f"{ours}.qkv.linear.weight", place, rows[part])
        first = place.stop
    yield Piece(f"{theirs}.in_proj_qkvz.weight", f"{ours}.gate.weight", their_rows=rows["z"])
    rows = interleaved({"b": times, "a": times}, heads)
    yield Piece(f"{theirs}.in_proj_ba.weight", f"{ours}.beta.weight", their_rows=rows["b"])
    yield Piece(f"{theirs}.in_proj_ba.weight", f"{ours}.decay.weight", their_rows=rows["a"])


def gated_attention_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """A softmax layer whose query matrix holds, head by head, the queries and the output gate."""
    rows = interleaved({"q": mixer.key, "gate": mixer.key}, mixer.shape.heads)
    inner, keys, _, _ = mixer.channels
    whole = mixer.qkv.weight.shape[0]
    for kind in ("weight", "bias") if mixer.qkv.bias is not None else ("weight",):
        yield Piece(f"{theirs}.q_proj.{kind}", f"{ours}.qkv.{kind}", slice(0, inner), rows["q"])
        yield Piece(f"{theirs}.q_proj.{kind}", f"{ours}.qkv.{kind}", slice(whole - inner, whole), rows["gate"])
        yield Piece(f"{theirs}.k_proj.{kind}", f"{ours}.qkv.{kind}", slice(inner, inner + keys))
        yield Piece(f"{theirs}.v_proj.{kind}", f"{ours}.qkv.{kind}", slice(inner + keys, inner + 2 * keys))
    for name in ("q_norm", "k_norm"):
        yield from plain(f"{theirs}.{name}", f"{ours}.{name}", mixer.get_submodule(name))
    yield from plain(f"{theirs}.o_proj", f"{ours}.out", mixer.out)


# Multi-token prediction and what sees pictures.
EXTRA = ("mtp.", "model.visual.", "visual.")
# Of these names PEFT makes experts' of old files, wherever they stand.
EXPERTS = (".gate_proj", ".up_proj", ".down_proj")
FAMILIES = {
    "qwen3_next": Qwen(EXTRA, fused=True, unadapted=EXPERTS, target=True),
    "qwen3_5_text": Qwen(EXTRA, target=True),
    "qwen3_5_moe_text": Qwen(EXTRA),
    **{name: Qwen(EXTRA, nested="text_config", prefix="model.language_model.") for name in ("qwen3_5", "qwen3_5_moe")},
}
