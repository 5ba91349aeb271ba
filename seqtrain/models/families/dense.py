"""Transformers of softmax attention and SwiGLU that differ in biases and norms: Llama, Mistral, Qwen2, Qwen3, Phi-3."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    Piece,
    activation,
    attention_keys,
    attention_pieces,
    common_keys,
    heads_of,
    mlp_pieces,
    network,
    outer_pieces,
    plain,
    rotation,
)
from seqtrain.models.language_model import LanguageModel

FULL, WINDOWED = "attention", "sliding_attention"


@dataclass(frozen=True)
class Dense(Family):
    """`qkv_bias`: queries, keys and values have one in every model; else as `attention_bias` says.

    `fused`: files hold the projections of queries, keys and values as one matrix, and those of the MLP (Phi-3).
    `gguf_interleaved`: GGUF files hold the rows of q and k so that neighbors are rotated together.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    gguf_interleaved: bool = False

    def architecture(self, config: Any, where: object) -> Architecture:
        _, shared, head = heads_of(config, where)
        biased = bool(getattr(config, "attention_bias", False))
        attention = {
            "query_group": shared,
            "head_width": head,
            "qk_norm": self.qk_norm,
            "norm_eps": config.rms_norm_eps,
            "qkv_bias": self.qkv_bias or biased,
            "out_bias": biased,
            **rotation(config, where, head),
        }
        layers = softmax_layers(config)
        own = {FULL: {}, WINDOWED: {"window": config.sliding_window}} if WINDOWED in layers else {FULL: {}}
        mixers = {name: MIXERS.get(name).Config(**attention, **own[name]) for name in own if name in layers}
        others = {"mlp_bias": bool(getattr(config, "mlp_bias", False)), "activation": activation(config, where)}
        return network(config, where, layers, mixers, **others)

    def config_of(self, model: LanguageModel) -> dict[str, Any]:
        windows = [getattr(block.mixer, "window", None) for block in model.blocks]
        keys = {**common_keys(model), **attention_keys(model), "mlp_bias": model.config.mlp_bias}
        keys["sliding_window"] = min((window for window in windows if window), default=None)
        if any(windows) and (self.qkv_bias or self.qk_norm):
            # Only Qwen's configs say it of each layer.
            keys["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
            keys["use_sliding_window"] = True
        return keys

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            if self.fused:
                yield from plain(f"{theirs}.self_attn.qkv_proj", f"{ours}.mixer.qkv", block.mixer.qkv)
                yield from plain(f"{theirs}.self_attn.o_proj", f"{ours}.mixer.out", block.mixer.out)
                yield from plain(f"{theirs}.mlp.gate_up_proj", f"{ours}.mlp.up", block.mlp.up)
                yield from plain(f"{theirs}.mlp.down_proj", f"{ours}.mlp.out", block.mlp.out)
            else:
                yield from attention_pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
                yield from mlp_pieces(f"{theirs}.mlp", f"{ours}.mlp", block.mlp)
            yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", block.mlp_norm)


def softmax_layers(config: Any) -> tuple[str, ...]:
    """The softmax mixer of each layer: a model's own sliding windows stay what they are."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        return ((WINDOWED if windowed else FULL),) * config.num_hidden_layers
    return tuple(WINDOWED if kind == "sliding_attention" else FULL for kind in kinds)


FAMILIES = {
    "llama": Dense(gguf_interleaved=True),
    "mistral": Dense(gguf_interleaved=True),
    "qwen2": Dense(qkv_bias=True),
    "qwen3": Dense(qk_norm=True),
    "phi3": Dense(fused=True),
}
