"""Families of pretrained models: for each a description of the network and a table of its tensors' names."""

import importlib
from collections.abc import Mapping

from seqtrain.errors import ConfigError, unknown_name
from seqtrain.models.families.base import Family, Piece

__all__ = ["FAMILIES", "Family", "Piece", "family_of"]

# By transformers' `model_type` (in GGUF files: the architecture): the module that has it in its own `FAMILIES`.
FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), "dense"),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3", "recurrent_gemma"), "gemma"),
    "lfm2": "lfm2",
    **dict.fromkeys(("olmo2", "olmo3", "olmo_hybrid"), "olmo"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"), "qwen"),
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "mamba"),
    **dict.fromkeys(("bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "zamba2"), "mamba_hybrid"),
    "minimax": "minimax",
    "xlstm": "xlstm",
    "seqtrain": "own",
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), "kimi"),
}


def family_of(model_type: str, where: object) -> Family:
    """The family of `model_type`, which stands in `where`. Raises `ConfigError` listing those there are."""
    if model_type not in FAMILIES:
        raise ConfigError(f"source={where}: " + unknown_name("architecture", model_type, FAMILIES))
    module = importlib.import_module(f"seqtrain.models.families.{FAMILIES[model_type]}")
    return module.FAMILIES[model_type]


def servable_targets() -> tuple[str, ...]:
    """The families that a Transformer can be converted to."""
    return tuple(filter(is_servable, FAMILIES))


def is_servable(target: str) -> bool:
    """Whether it is such a family; only its own module is imported."""
    return target in FAMILIES and family_of(target, "target").target
