"""From a composed Hydra config to a checked `PretrainConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.runtime.settings import PretrainConfig, check, resolve
from seqtrain.validation import validate


def read_pretrain_config(config: DictConfig) -> PretrainConfig:
    """The typed config of a run, with the rules between its keys checked. Raises `ConfigError` with one line."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    typed = typed_pretrain_config(values)
    check(typed)
    return typed


def typed_pretrain_config(values: Mapping[str, Any]) -> PretrainConfig:
    """Plain values, composed or read from a run's config.yaml, as a `PretrainConfig`. Raises `ConfigError`.

    Every mixer's section is checked, those that `model.layers` uses are kept; each `auto` becomes a number.
    """
    sections = values.get("mixer", {})
    typed = validate(PretrainConfig, {**values, "mixer": {}})
    mixers: dict[str, Any] = {
        name: validate(_mixer_config(name), section, prefix=f"mixer.{name}.") for name, section in sections.items()
    }
    used = {name: mixers[name] if name in mixers else _defaults(name) for name in typed.model.layers}
    return resolve(dataclasses.replace(typed, mixer=used))


def _mixer_config(name: str) -> type:
    return MIXERS.get(name).Config


def _defaults(name: str) -> Any:
    """The config of a mixer whose section is left out."""
    try:
        mixer = MIXERS.get(name)
    except ConfigError as error:
        raise ConfigError(f"model.layers: {error}") from error
    try:
        return mixer.Config()
    except TypeError as error:
        raise ConfigError(f"mixer.{name}: has no defaults ({error}); write conf/mixer/{name}.yaml") from error
