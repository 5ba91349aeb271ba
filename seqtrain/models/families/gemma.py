"""Gemma 2, Gemma 3 (text) and RecurrentGemma: norms by 1 + weight, scaled embeddings, softly bounded logits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    Piece,
    activation,
    attention_pieces,
    heads_of,
    mlp_pieces,
    network,
    outer_pieces,
    plain,
    require,
    rotation,
    split,
)
from seqtrain.models.families.dense import WINDOWED, softmax_layers
from seqtrain.models.language_model import LanguageModel

RECURRENT = "rg_lru"


@dataclass(frozen=True)
class Gemma2(Family):
    """Softmax attention over windows and over everything, with capped scores; norms on both sides.

    `prefix`: before the names of the text model's tensors.
    """

    prefix: str = field(default="model.", kw_only=True)

    def architecture(self, config: Any, where: object) -> Architecture:
        # Null is false here.
        both = getattr(config, "use_bidirectional_attention", False)
        require(config, where, **({"use_bidirectional_attention": False} if both else {}))
        layers = softmax_layers(config)
        mixers = {name: self.attention(config, where, name) for name in dict.fromkeys(layers)}
        others = {
            "norms": ("both",),
            "norm_zero_centered": True,
            "embedding_scale": config.hidden_size**0.5,
            # transformers' larger model leaves the cap out.
            "logit_cap": 0.0 if self.nested else config.final_logit_softcapping or 0.0,
            "activation": activation(config, where, "hidden_activation"),
        }
        return network(config, where, layers, mixers, **others)

    def attention(self, config: Any, where: object, name: str) -> Any:
        """The config of softmax layers called `name`."""
        _, shared, head = heads_of(config, where)
        fields = {
            "query_group": shared,
            "head_width": head,
            "qkv_bias": bool(config.attention_bias),
            "out_bias": bool(config.attention_bias),
            "scale": config.query_pre_attn_scalar**-0.5,
            "score_cap": config.attn_logit_softcapping or 0.0,
            **self.own_fields(config, where, head, name),
        }
        return MIXERS.get(name).Config(**fields, **({"window": config.sliding_window} if name == WINDOWED else {}))

    def own_fields(self, config: Any, where: object, head: int, name: str) -> dict[str, Any]:
        """Those that differ between Gemmas, of layers called `name`."""
        return rotation(config, where, head)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model, self.prefix)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"{self.prefix}layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            yield from attention_pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mixer_post_norm", block.mixer_post_norm)
            yield from plain(f"{theirs}.pre_feedforward_layernorm", f"{ours}.mlp_norm", block.mlp_norm)
            yield from mlp_pieces(f"{theirs}.mlp", f"{ours}.mlp", block.mlp)
            yield from plain(f"{theirs}.post_feedforward_layernorm", f"{ours}.mlp_post_norm", block.mlp_post_norm)


@dataclass(frozen=True)
class Gemma3(Gemma2):
    """With normalised queries and keys, and a rotation of its own for each kind of layer."""

    def own_fields(self, config: Any, where: object, head: int, name: str) -> dict[str, Any]:
        kind = "sliding_attention" if name == WINDOWED else "full_attention"
        norm = {"qk_norm": True, "qk_norm_zero_centered": True, "norm_eps": config.rms_norm_eps}
        return norm | rotation(config, where, head, kind)


@dataclass(frozen=True)
class RecurrentGemma(Family):
    """RG-LRU or windowed softmax attention, then a gated MLP with biases."""

    def architecture(self, config: Any, where: object) -> Architecture:
        require(config, where, hidden_activation="gelu_pytorch_tanh")
        heads, shared, head = heads_of(config, where)
        layers = [RECURRENT if kind == "linear_attention" else WINDOWED for kind in config.layers_block_type]
        mixers = {
            RECURRENT: MIXERS.get(RECURRENT).Config(
                head_width=config.lru_width // heads,
                conv_width=config.conv1d_width,
                whole_start=True,
            ),
            WINDOWED: MIXERS.get(WINDOWED).Config(
                query_group=shared,
                head_width=head,
                qkv_bias=config.attention_bias,
                out_bias=True,
                window=config.attention_window_size,
                **rotation(config, where, head),
            ),
        }
        others = {
            "norm_zero_centered": True,
            # transformers rounds it, whatever the model's dtype.
            "embedding_scale": float(torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16)),
            "logit_cap": config.logits_soft_cap,
            "activation": activation(config, where, "hidden_activation"),
            "mlp_width": config.intermediate_size // 2,
            "mlp_bias": True,
        }
        return network(config, where, layers, mixers, **others)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model, norm="final_norm")
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.temporal_pre_norm", f"{ours}.mixer_norm", block.mixer_norm)
            layer = attention_pieces if hasattr(block.mixer, "qkv") else recurrent_pieces
            yield from layer(f"{theirs}.temporal_block", f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.channel_pre_norm", f"{ours}.mlp_norm", block.mlp_norm)
            yield from mlp_pieces(f"{theirs}.mlp_block", f"{ours}.mlp", block.mlp)


def recurrent_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """An RG-LRU layer."""
    names = (f"{theirs}.linear_y", f"{theirs}.linear_x")
    yield from split(names, f"{ours}.parts", mixer.parts, 2 * [mixer.hidden])
    yield from plain(f"{theirs}.conv_1d", f"{ours}.conv", mixer.conv, lifted=True)
    for name, own in (("input_gate", "input_gate"), ("recurrent_gate", "decay_gate")):
        yield Piece(f"{theirs}.rg_lru.{name}_weight", f"{ours}.{own}.weight")
        yield Piece(f"{theirs}.rg_lru.{name}_bias", f"{ours}.{own}.bias", shape=(-1, mixer.head))
    yield Piece(f"{theirs}.rg_lru.recurrent_param", f"{ours}.rate")
    yield from plain(f"{theirs}.linear_out", f"{ours}.out", mixer.out)


# What sees pictures, by the names that files have and that transformers' own modules have.
PICTURES = tuple(f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))
RENAMED = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
FAMILIES = {
    "gemma2": Gemma2(),
    "gemma3_text": Gemma3(),
    "gemma3": Gemma3(PICTURES, nested="text_config", prefix="model.language_model.", renamed=RENAMED),
    "recurrent_gemma": RecurrentGemma(),
}
