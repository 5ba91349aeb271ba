"""Mamba, Mamba-2 and FalconMamba: one recurrent mixer a layer, and nothing that works on channels."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isinf
from typing import Any, Literal

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.mixers.mamba2 import Mamba2 as Mamba2Mixer
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import Family, Piece, common_keys, network, plain, require
from seqtrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Mamba2(Family):
    """A stack of Mamba-2 layers, whose heads need not have to do with the width."""

    def architecture(self, config: Any, where: object) -> Architecture:
        name, mixer = self.mixer(config, where)
        layers = [name] * config.num_hidden_layers
        others = {"mlps": ("none",), "norm_eps": config.layer_norm_epsilon}
        return network(config, where, layers, {name: mixer}, **others)

    def mixer(self, config: Any, where: object) -> tuple[str, Any]:
        """The name and config of every layer's mixer."""
        require(config, where, hidden_act="silu")
        mixer = MIXERS.get("mamba2").Config(
            heads=config.num_heads,
            head_width=config.head_dim,
            state=config.state_size,
            groups=config.n_groups,
            conv_width=config.conv_kernel,
            norm_eps=config.layer_norm_epsilon,
            in_bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            out_bias=config.use_bias,
            **step_limits(config.time_step_limit),
        )
        return "mamba2", mixer

    def config_of(self, model: LanguageModel) -> dict[str, Any]:
        mixer = model.blocks[0].mixer
        if type(mixer) is not Mamba2Mixer:
            raise ConfigError("it has other layers than mamba2")
        common, own = common_keys(model), mixer.config
        kept = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "initializer_range")
        return {
            **{key: common[key] for key in kept},
            "num_heads": mixer.shape.heads,
            "head_dim": mixer.value,
            "expand": mixer.inner // model.config.width,
            "state_size": own.state,
            "n_groups": own.groups,
            "conv_kernel": own.conv_width,
            "layer_norm_epsilon": model.config.norm_eps,
            "use_bias": mixer.out.bias is not None,
            "use_conv_bias": mixer.conv.bias is not None,
        }

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from stack_pieces(model, "backbone.")
        for index, block in enumerate(model.blocks):
            yield from plain(f"backbone.layers.{index}.norm", f"blocks.{index}.mixer_norm", block.mixer_norm)
            yield from self.mixer_pieces(f"backbone.layers.{index}.mixer", f"blocks.{index}.mixer", block.mixer)

    def mixer_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        """A layer's mixer."""
        yield from mamba2_pieces(theirs, ours, mixer)


@dataclass(frozen=True)
class Mamba(Mamba2):
    """A stack of Mamba layers. `norms`: those of step sizes, B and C."""

    norms: Literal["none", "plain"] = "none"

    def mixer(self, config: Any, where: object) -> tuple[str, Any]:
        require(config, where, hidden_act="silu")
        mixer = MIXERS.get("mamba").Config(
            inner_width=config.intermediate_size,
            state=config.state_size,
            conv_width=config.conv_kernel,
            rank=config.time_step_rank,
            norms=self.norms,
            norm_eps=config.mixer_rms_eps if self.norms == "plain" else 1e-6,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
        )
        return "mamba", mixer

    def mixer_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        yield from mamba_pieces(theirs, ours, mixer)


def step_limits(limits: Any) -> dict[str, float]:
    """A Mamba-2 mixer's fields for the config's lowest and highest step size."""
    low, high = limits or (0.0, 0.0)
    return {"step_min": float(low), "step_max": 0.0 if isinf(high) else float(high)}


def stack_pieces(model: LanguageModel, prefix: str) -> Iterator[Piece]:
    """Embedding, last norm and head as Mamba's own code calls them."""
    yield Piece(f"{prefix}embeddings.weight", "embedding.weight")
    yield Piece(f"{prefix}norm_f.weight", "norm.weight")
    yield Piece("lm_head.weight", "head.weight")


def mamba2_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """A Mamba-2 layer."""
    yield from plain(f"{theirs}.in_proj", f"{ours}.project", mixer.project)
    yield from plain(f"{theirs}.conv1d", f"{ours}.conv", mixer.conv, lifted=True)
    yield from plain(f"{theirs}.norm", f"{ours}.norm", mixer.norm)
    yield from plain(f"{theirs}.out_proj", f"{ours}.out", mixer.out)
    for name, own in (("A_log", "rate_log"), ("dt_bias", "step_bias"), ("D", "skip")):
        yield Piece(f"{theirs}.{name}", f"{ours}.{own}")


def mamba_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """A Mamba layer."""
    yield from plain(f"{theirs}.conv1d", f"{ours}.conv", mixer.conv, lifted=True)
    modules = (("in_proj", "project"), ("x_proj", "select"), ("dt_proj", "time_step"), ("out_proj", "out"))
    norms = (("dt_layernorm", "norms.0"), ("b_layernorm", "norms.1"), ("c_layernorm", "norms.2"))
    for name, own in (*modules, *norms):
        yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))
    yield Piece(f"{theirs}.dt_proj.bias", f"{ours}.step_bias")
    yield Piece(f"{theirs}.A_log", f"{ours}.rate_log", shape=(-1, mixer.config.state))
    yield Piece(f"{theirs}.D", f"{ours}.skip")


# As the files of its authors call it.
RENAMED = (("backbone.embedding.", "backbone.embeddings."),)
# transformers takes their weights in place of calling them, where an adapter is not seen.
UNADAPTED = (".out_proj", ".dt_proj")
FAMILIES = {
    "mamba": Mamba(renamed=RENAMED, unadapted=UNADAPTED),
    "falcon_mamba": Mamba(norms="plain", renamed=RENAMED, unadapted=UNADAPTED),
    "mamba2": Mamba2(renamed=RENAMED, unadapted=UNADAPTED),
}
