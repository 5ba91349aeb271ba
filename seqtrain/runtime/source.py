"""A run that continues a pretrained model: its network in the config, its weights at the start, its export."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seqtrain.errors import ConfigError
from seqtrain.initialization import Fill
from seqtrain.models.config import ModelConfig
from seqtrain.models.feed_forward import RouterConfig
from seqtrain.models.language_model import LanguageModel
from seqtrain.models.lora import add_adapters, chosen, targets_of, write_adapter
from seqtrain.models.pretrained import (
    architecture_of,
    copy_companions,
    origin_of,
    places_of,
    source_weights,
    write_folder,
)
from seqtrain.models.source import open_source
from seqtrain.validation import AUTO

if TYPE_CHECKING:
    from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")

# Keys of `model` that say how its network is computed, and not which it is.
OWN_KEYS = ("activation_checkpointing", "recompute", "recompute_inputs", "loss_chunk")
# And of `model.router`, how it is trained.
ROUTER_KEYS = ("balance", "z_loss", "bias_rate")


def with_network_of_source(config: "PretrainConfig") -> "PretrainConfig":
    """`config` with the network of `config.source`, and its tokenizer unless the config names one.

    Raises `ConfigError` for a source that can't be continued, and for keys that would change its network.
    """
    source = open_source(config.source)
    found = architecture_of(source, config.train.sequence_length)
    changed = _changed(config.model, ModelConfig(), (*OWN_KEYS, "router"))
    routers = _changed(config.model.router, RouterConfig(), ROUTER_KEYS)
    for key, came in [*changed.items(), *((f"router.{key}", came) for key, came in routers.items())]:
        raise ConfigError(f"model.{key}={came}: source={config.source} brings a network of its own; leave it out")
    router = replace(found.model.router, **{key: getattr(config.model.router, key) for key in ROUTER_KEYS})
    if router.bias and router.bias_rate == AUTO:
        router = replace(router, bias_rate=0.0)
    own = {"router": router, **{key: getattr(config.model, key) for key in OWN_KEYS}}
    data = config.data
    if data.tokenizer == "bytes" and source.tokenizer() is not None:
        data = replace(data, tokenizer=config.source)
    model = replace(found.model, vocab_size=found.vocab_size, **own)
    # What is wrong with the files, or with names of matrices, is known before anything starts.
    places_of(found.build(), source)
    add_own_adapters(config, found.build())
    return replace(config, model=model, mixer=dict(found.mixers), data=data)


def _changed(config: Any, plain: Any, besides: tuple[str, ...]) -> dict[str, Any]:
    """Values of `config` that are not those of `plain`, by key."""
    return {key: came for key, came in vars(config).items() if key not in besides and came != vars(plain)[key]}


def build_model(config: "PretrainConfig", vocab_size: int) -> LanguageModel:
    """The network of a run on the meta device, with its adapters if it trains these. Raises `ConfigError`."""
    with torch.device("meta"):
        model = LanguageModel(config.model, config.mixer, vocab_size)
    # Outside: which rows an adapter is for are numbers, not weights.
    add_own_adapters(config, model)
    return model


def add_own_adapters(config: "PretrainConfig", model: LanguageModel) -> None:
    """Puts the adapters that `config.lora` asks for on `model`, which alone require gradients then; or does nothing."""
    lora = config.lora
    if lora.rank:
        source = open_source(config.source)
        there = targets_of(model, source.family, source.config)
        add_adapters(model, chosen(there, lora.targets, config.source), rank=lora.rank, alpha=lora.alpha)


def frozen_weights(config: "PretrainConfig", model: LanguageModel) -> frozenset[str]:
    """Names of the parameters of a run's model that are those of its source, and that no checkpoint holds."""
    named = model.named_parameters() if config.lora.rank else ()
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


def first_weights(config: "PretrainConfig", model: LanguageModel, *, sha256: str = "") -> Fill:
    """What the weights of a run's model begin with: its source's, and new ones by its seed. Raises `CheckpointError`.

    `sha256`: what the source's weights must have; "" trusts the files.
    """
    new = model.initial_weights(config.seed)
    if not config.source:
        return new
    source = open_source(config.source, sha256)
    fill = source_weights(model, source, new)
    quantized = f", dequantized from {source.quantized}" if source.quantized else ""
    log.info("source: weights of %s%s", source.path, quantized)
    if carried := sorted(source.shapes.keys() - places_of(model, source).keys()):
        log.info("source: carried along untouched: %s", ", ".join(carried))
    return fill


def type_of_source(config: "PretrainConfig") -> str:
    """The Hugging Face type of `config.source`."""
    return str(open_source(config.source).config.model_type)


def write_own_adapter(config: "PretrainConfig", model: LanguageModel, folder: Path) -> None:
    """Writes the adapters of a run into the empty `folder` as PEFT has them, and the source's tokenizer."""
    source = open_source(config.source)
    write_adapter(model, source.family, source.config, folder, base=config.source)
    if source.path.is_dir():
        copy_companions(source.path, folder)


def write_as_source(config: "PretrainConfig", model: LanguageModel, folder: Path) -> None:
    """Writes `model` into the empty `folder` as the Hugging Face type that `config.source` is."""
    write_folder(model, origin_of(open_source(config.source)), folder)
