"""From a composed Hydra config to a checked `PretrainConfig`."""

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seqtrain.config import validate
from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.runtime.settings import PretrainConfig, check


def read_pretrain_config(config: DictConfig, output_dir: str) -> PretrainConfig:
    """The typed config of a run that writes to `output_dir`. Raises `ConfigError` with one line.

    Every mixer's section is checked, those that `model.layers` uses are kept.
    """
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    sections = values.pop("mixer", {})
    checked = validate(PretrainConfig, values | {"mixer": {}, "output_dir": output_dir})
    mixers: dict[str, Any] = {
        name: validate(_mixer_config(name), section, prefix=f"mixer.{name}.") for name, section in sections.items()
    }
    used = {name: mixers[name] if name in mixers else _defaults(name) for name in checked.model.layers}
    checked = dataclasses.replace(checked, mixer=used)
    check(checked)
    return checked


def _mixer_config(name: str) -> type:
    return MIXERS.get(name).Config


def _defaults(name: str) -> Any:
    """The config of a mixer that has no file in conf/mixer."""
    try:
        mixer = MIXERS.get(name)
    except ConfigError as error:
        raise ConfigError(f"model.layers: {error}") from error
    try:
        return mixer.Config()
    except TypeError as error:
        raise ConfigError(f"mixer.{name}: has no defaults ({error}); write conf/mixer/{name}.yaml") from error
