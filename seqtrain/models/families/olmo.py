"""OLMo 2, OLMo 3 and OLMo-Hybrid: norms behind softmax layers, queries and keys normalised over all heads together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
    delta_fields,
    delta_keys,
    heads_of,
    mlp_pieces,
    network,
    outer_pieces,
    plain,
    rotation,
    split,
)
from seqtrain.models.families.dense import FULL, WINDOWED, softmax_layers
from seqtrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Olmo(Family):
    """Softmax attention and SwiGLU, each normalised where it leaves, before it is added."""

    def architecture(self, config: Any, where: object) -> Architecture:
        layers = softmax_layers(config)
        mixers = {name: self.attention(config, where, name) for name in dict.fromkeys(layers)}
        others = {"norms": ("post",), "activation": activation(config, where)}
        return network(config, where, layers, mixers, **others)

    def attention(self, config: Any, where: object, name: str) -> Any:
        """The config of softmax layers called `name`."""
        _, shared, head = heads_of(config, where)
        biased = bool(config.attention_bias)
        kind = "sliding_attention" if name == WINDOWED else "full_attention"
        fields = {
            "query_group": shared,
            "head_width": head,
            "qk_norm": True,
            "qk_norm_over": "all",
            "norm_eps": config.rms_norm_eps,
            "qkv_bias": biased,
            "out_bias": biased,
            **(rotation(config, where, head, kind) if config.rope_parameters else {"rope_width": 0}),
        }
        return MIXERS.get(name).Config(**fields, **({"window": config.sliding_window} if name == WINDOWED else {}))

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from self.layer_pieces(theirs, ours, block)
            yield from mlp_pieces(f"{theirs}.mlp", f"{ours}.mlp", block.mlp)

    def layer_pieces(self, theirs: str, ours: str, block: Any) -> Iterator[Piece]:
        """All of a layer but its MLP."""
        yield from attention_pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
        yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mixer_post_norm", block.mixer_post_norm)
        yield from plain(f"{theirs}.post_feedforward_layernorm", f"{ours}.mlp_post_norm", block.mlp_post_norm)


@dataclass(frozen=True)
class OlmoHybrid(Olmo):
    """Gated DeltaNet with norms in front, and Olmo's softmax layers."""

    def architecture(self, config: Any, where: object) -> Architecture:
        names = {"linear_attention": "gated_delta_net", "full_attention": FULL}
        layers = [names[kind] for kind in config.layer_types]
        delta = MIXERS.get("gated_delta_net").Config(
            **delta_fields(config),
            allow_negative_eigenvalues=config.linear_allow_neg_eigval,
            norm_eps=1e-5,
        )
        norms = tuple("post" if name == FULL else "pre" for name in layers)
        others = {"norms": norms, "activation": activation(config, where)}
        mixers = {"gated_delta_net": delta, FULL: self.attention(config, where, FULL)}
        return network(config, where, layers, mixers, **others)

    def config_of(self, model: LanguageModel) -> dict[str, Any]:
        keys = {key: value for key, value in attention_keys(model).items() if key != "head_dim"}
        return {**common_keys(model), **keys, **delta_keys(model)}

    def fitted(self, places: dict[str, list[Piece]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """transformers 5.23 joins the convolutions of q, k and v, and saves them as three equal parts."""
        found, first = dict(places), 0
        for name, pieces in places.items():
            if not name.endswith("_conv1d.weight") or name not in shapes:
                continue
            first = 0 if name.endswith(".q_conv1d.weight") else first
            found[name] = [replace(pieces[0], our_rows=slice(first, first + shapes[name][0]))]
            first += shapes[name][0]
        return found

    def layer_pieces(self, theirs: str, ours: str, block: Any) -> Iterator[Piece]:
        if not hasattr(block.mixer, "rate_log"):
            yield from super().layer_pieces(theirs, ours, block)
            return
        yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
        yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", block.mlp_norm)
        theirs, ours, mixer = f"{theirs}.linear_attn", f"{ours}.mixer", block.mixer
        names = [f"{theirs}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        yield from split(names, f"{ours}.qkv.linear", mixer.qkv.linear, mixer.qkv.channels)
        names = [f"{theirs}.{name}" for name in ("q_conv1d", "k_conv1d", "v_conv1d")]
        yield from split(names, f"{ours}.qkv.conv", mixer.qkv.conv, mixer.qkv.channels, lifted=True)
        for name, own in (("a_proj", "decay"), ("b_proj", "beta"), ("g_proj", "gate"), ("o_proj", "out")):
            yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))
        yield from plain(f"{theirs}.o_norm", f"{ours}.norm.norm", mixer.norm.norm)
        yield Piece(f"{theirs}.A_log", f"{ours}.rate_log")
        yield Piece(f"{theirs}.dt_bias", f"{ours}.step_bias")


RENAMED = (("attention_layer_norm", "input_layernorm"), ("feedforward_layer_norm", "post_attention_layernorm"))
FAMILIES = {"olmo2": Olmo(), "olmo3": Olmo(), "olmo_hybrid": OlmoHybrid(renamed=RENAMED)}
