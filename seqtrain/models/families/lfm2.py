"""LFM2: gated short convolutions and softmax attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    Piece,
    attention_pieces,
    heads_of,
    mlp_pieces,
    network,
    outer_pieces,
    plain,
    rotation,
)
from seqtrain.models.families.dense import FULL
from seqtrain.models.language_model import LanguageModel

CONV = "gated_convolution"


@dataclass(frozen=True)
class Lfm2(Family):
    """A convolution or softmax attention with normalised queries and keys, then SwiGLU."""

    def architecture(self, config: Any, where: object) -> Architecture:
        _, shared, head = heads_of(config, where)
        layers = [CONV if kind == "conv" else FULL for kind in config.layer_types]
        mixers = {
            CONV: MIXERS.get(CONV).Config(conv_width=config.conv_L_cache, bias=config.conv_bias),
            FULL: MIXERS.get(FULL).Config(
                query_group=shared,
                head_width=head,
                qk_norm=True,
                norm_eps=config.norm_eps,
                **rotation(config, where, head),
            ),
        }
        others = {"norm_eps": config.norm_eps, "mlp_width": hidden_of(config)}
        return network(config, where, layers, mixers, **others)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model, norm="embedding_norm")
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.operator_norm", f"{ours}.mixer_norm", block.mixer_norm)
            if config.layer_types[index] == "conv":
                yield from conv_pieces(theirs, f"{ours}.mixer", block.mixer)
            else:
                names: dict[str, Any] = {"norms": ("q_layernorm", "k_layernorm"), "out": "out_proj"}
                yield from attention_pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer, **names)
            yield from plain(f"{theirs}.ffn_norm", f"{ours}.mlp_norm", block.mlp_norm)
            yield from mlp_pieces(f"{theirs}.feed_forward", f"{ours}.mlp", block.mlp, gate="w1", up="w3", down="w2")


def hidden_of(config: Any) -> int:
    """Hidden channels of the MLP."""
    hidden = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return hidden
    hidden = int(2 * hidden / 3)
    if config.block_ffn_dim_multiplier is None:
        return hidden
    multiple = config.block_multiple_of
    return multiple * -(-int(config.block_ffn_dim_multiplier * hidden) // multiple)


def conv_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """A convolution layer."""
    yield from plain(f"{theirs}.conv.in_proj", f"{ours}.parts", mixer.parts)
    yield from plain(f"{theirs}.conv.conv", f"{ours}.conv", mixer.conv, lifted=True)
    yield from plain(f"{theirs}.conv.out_proj", f"{ours}.out", mixer.out)


FAMILIES = {"lfm2": Lfm2()}
