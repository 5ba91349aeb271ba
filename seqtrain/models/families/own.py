"""seqtrain's own model type, as conversions and exports write it: every parameter under its own name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import Family, Piece
from seqtrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Own(Family):
    """Any network at all."""

    def architecture(self, config: Any, where: object) -> Architecture:
        config.check()
        with torch.device("meta"):
            model = config.build()
        return Architecture(model.config, model.mixers, model.vocab_size)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        # A tied head is in the file once.
        for name, _ in model.named_parameters():
            yield Piece(f"model.{name}", name)


FAMILIES = {"seqtrain": Own()}
