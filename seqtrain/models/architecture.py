"""All that makes a network but its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seqtrain.models.config import ModelConfig
from seqtrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Architecture:
    """`model.layers` names the mixer of every layer; `mixers`: the `Config` of each by that name."""

    model: ModelConfig
    mixers: Mapping[str, Any]
    vocab_size: int

    def build(self) -> LanguageModel:
        """The network on the meta device, without memory. Raises `ConfigError`."""
        with torch.device("meta"):
            return LanguageModel(self.model, self.mixers, self.vocab_size)
