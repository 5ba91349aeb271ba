"""Which layers keep softmax attention."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.convert.architecture import FULL, WINDOWED
from seqtrain.convert.measure import agreement, hidden_states
from seqtrain.convert.settings import POLICY
from seqtrain.errors import ConfigError
from seqtrain.files import Manifest
from seqtrain.models import LanguageModel


@dataclass(frozen=True)
class LayerChoice(Manifest):
    """`layers.json`: the layers that keep softmax attention, all mixers' names, and the scores of the choice."""

    error = ConfigError
    remedy = "keep takes the layers.json of a conversion, or an object with keep, a list of layers from 0"

    keep: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    layers: list[str] | None = None
    importance: list[float] | None = None


def kept_layers(
    keep: str | tuple[int, ...], depth: int, importance: Callable[[], list[float]]
) -> tuple[tuple[int, ...], list[float] | None]:
    """The numbers of the layers that stay, rising, and each layer's importance where it was measured.

    `keep`: as `ConvertConfig.keep`. `importance`: measures each layer, called for a budget only. Raises `ConfigError`.
    """
    scores = None
    if not isinstance(keep, str):
        kept = keep
    elif keep.endswith(".json"):
        choice = LayerChoice.read(Path(keep).expanduser())
        if choice.layers and len(choice.layers) != depth:
            raise ConfigError(f"keep={keep}: is of a model with {len(choice.layers)} layers, not {depth}")
        kept, scores = choice.keep, choice.importance
    elif keep == "none":
        return (), None
    else:
        matched = POLICY.fullmatch(keep)
        assert matched is not None, keep
        number = int(matched[2])
        kept = tuple(range(number - 1, depth, number) if matched[1] == "every" else range(number))
    _check(kept, depth)
    if isinstance(keep, str) and keep.startswith("budget:"):
        scores = measured = importance()
        kept = tuple(sorted(range(depth), key=lambda index: (-measured[index], index))[: len(kept)])
    return tuple(sorted(set(kept))), scores


def _check(kept: Collection[int], depth: int) -> None:
    """Raises `ConfigError` for a layer that does not exist, or where all layers would stay as they are."""
    if beyond := [index for index in kept if index >= depth]:
        raise ConfigError(f"keep={sorted(kept)}: the model has layers 0 to {depth - 1}, not {beyond[0]}")
    if len(set(kept)) == depth:
        raise ConfigError(f"keep={sorted(kept)}: leaves no layer to convert; keep fewer than {depth}")


def layers_that_stay(layers: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the layers that are still softmax attention, of the mixers' names."""
    return tuple(index for index, name in enumerate(layers) if name in (FULL, WINDOWED))


def write_layers(file: Path, layers: Sequence[str], importance: list[float] | None) -> None:
    """Writes what was chosen, for people and for `keep=FILE.json`."""
    LayerChoice(layers_that_stay(layers), list(layers), importance).write(file)


@torch.no_grad()
def restore_one_layer(
    student: LanguageModel, teacher: LanguageModel, tokens: Tensor, progress: Callable[[str], None]
) -> list[float]:
    """By how much each layer's own attention lowers `KL(teacher | student)` of the fully converted student.

    `tokens: int64 [B,T]`. Mean nats per token, layer by layer.
    """
    expected = hidden_states(teacher, tokens)

    def divergence() -> float:
        return agreement(teacher, expected, student, hidden_states(student, tokens))[0]

    without, scores = divergence(), []
    for index, (mine, theirs) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        progress(f"layer {index}")
        replaced, mine.mixer = mine.mixer, theirs.mixer
        scores.append(without - divergence())
        mine.mixer = replaced
    return scores
