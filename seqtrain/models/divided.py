"""A language model of which each tensor-parallel rank has a part: which weights are divided and how."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqtrain.mixers import Mixer
from seqtrain.models.feed_forward import MLP
from seqtrain.models.language_model import LanguageModel
from seqtrain.models.spark import SparkMLP
from seqtrain.parallel.tensor import Division, RowLinear, TensorParallel, divisions


@dataclass(frozen=True)
class Divided:
    """`model`, this rank's part on the meta device, and how its weights are divided; those not named here are not."""

    model: LanguageModel
    divisions: Mapping[str, Division]

    @property
    def tensor(self) -> TensorParallel:
        return self.model.tensor

    @property
    def shared(self) -> list[nn.Parameter]:
        """Weights inside divided layers that every rank has whole: of their gradients it has a part of the sum."""
        named = dict(self.model.named_parameters())
        apart = {named[name] for name in self.divisions}
        # What is added to a layer's whole result.
        apart |= {part.bias for part in self.model.modules() if isinstance(part, RowLinear) and part.bias is not None}
        layers = [part for part in self.model.modules() if isinstance(part, Mixer | MLP | SparkMLP)]
        inside = dict.fromkeys(weight for layer in layers for weight in layer.parameters())
        return [weight for weight in inside if weight not in apart]

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of the weight called `name`, or of anything of its shape."""
        tensor = self.tensor
        return self.divisions[name].own(whole, tensor.rank, tensor.count) if name in self.divisions else whole

    def whole_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """Of the weight called `name`, of which this rank's part has `shape`."""
        if (division := self.divisions.get(name)) is None:
            return shape
        return torch.Size((*shape[: division.dim], sum(division.parts), *shape[division.dim + 1 :]))


def divide(whole: LanguageModel, tensor: TensorParallel) -> Divided:
    """This rank's part of a model. Raises `ConfigError` where it can't be divided by so many."""
    with torch.device("meta"):
        model = LanguageModel(whole.config, whole.mixers, whole.vocab_size, tensor=tensor)
    shapes = {name: weight.shape for name, weight in whole.named_parameters()}
    return Divided(model, divisions(model, shapes))
