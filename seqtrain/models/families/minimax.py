"""MiniMax-Text-01: lightning attention, softmax attention in some layers, experts; DeepNorm's sums."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    MoENames,
    Piece,
    attention_pieces,
    heads_of,
    interleaved,
    moe_pieces,
    network,
    outer_pieces,
    plain,
    require,
    rotation,
)
from seqtrain.models.families.dense import FULL, WINDOWED
from seqtrain.models.language_model import LanguageModel

LIGHTNING = "lightning_attention"


@dataclass(frozen=True)
class MiniMax(Family):
    """What each layer normalises is what it adds to: the norms stand in the residual stream."""

    def architecture(self, config: Any, where: object) -> Architecture:
        require(config, where, hidden_act="silu")
        _, shared, head = heads_of(config, where)
        softmax, window = (FULL, {}) if config.sliding_window is None else (WINDOWED, {"window": config.sliding_window})
        layers = [LIGHTNING if kind == "linear_attention" else softmax for kind in config.layer_types]
        # transformers turns all channels, whatever the config says.
        turned = rotation(config, where, head) | {"rope_width": None}
        mixers = {
            LIGHTNING: MIXERS.get(LIGHTNING).Config(head_width=head),
            softmax: MIXERS.get(softmax).Config(query_group=shared, head_width=head, **turned, **window),
        }
        others = {
            "norms": ("stream",),
            "sum_scales": tuple(sum_scales(config, kind) for kind in config.layer_types),
            "experts": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
        }
        return network(config, where, layers, mixers, **others)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model)
        names = MoENames(gate="w1", up="w3", down="w2")
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            pieces = lightning_pieces if config.layer_types[index] == "linear_attention" else attention_pieces
            yield from pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", block.mlp_norm)
            yield from moe_pieces(f"{theirs}.block_sparse_moe", f"{ours}.mlp", block.mlp, names)


def sum_scales(config: Any, kind: str) -> tuple[float, ...]:
    """The factors of the sums of a layer of that kind: on stream and mixer, on stream and experts."""
    part = "linear_attn" if kind == "linear_attention" else "full_attn"
    names = (f"{part}_alpha", f"{part}_beta", "mlp_alpha", "mlp_beta")
    return tuple(float(getattr(config, f"{name}_factor")) for name in names)


def lightning_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """A lightning attention layer, whose matrix holds query, key and value of each head in turn."""
    rows = interleaved(dict.fromkeys("qkv", mixer.head), mixer.shape.heads)
    inner = mixer.shape.heads * mixer.head
    for index, part in enumerate("qkv"):
        place = slice(index * inner, (index + 1) * inner)
        yield Piece(f"{theirs}.qkv_proj.weight", f"{ours}.qkv.linear.weight", place, rows[part])
    yield from plain(f"{theirs}.norm", f"{ours}.norm.norm", mixer.norm.norm)
    yield from plain(f"{theirs}.output_gate", f"{ours}.gate", mixer.gate)
    yield from plain(f"{theirs}.out_proj", f"{ours}.out", mixer.out)


# What follows from sizes and depth alone, which transformers keeps as buffers and saves.
DECAYS = tuple(f".self_attn.{name}" for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"))
FAMILIES = {"minimax": MiniMax(ignored=(".rotary_emb.inv_freq", *DECAYS))}
