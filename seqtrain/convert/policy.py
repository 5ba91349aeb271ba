"""Which layers keep softmax attention."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from seqtrain.convert.architecture import FULL, WINDOWED
from seqtrain.convert.scores import agreement, hidden_states
from seqtrain.convert.settings import POLICY
from seqtrain.convert.student import check_layers
from seqtrain.errors import ConfigError
from seqtrain.models import LanguageModel
from seqtrain.report import write_json


def kept_layers(
    keep: str | tuple[int, ...], depth: int, importance: Callable[[], list[float]]
) -> tuple[tuple[int, ...], list[float] | None]:
    """The numbers of the layers that stay, rising, and each layer's importance where it was measured.

    `keep`: as `ConvertConfig.keep`. `importance`: measures each layer, called for a budget only. Raises `ConfigError`.
    """
    if not isinstance(keep, str):
        check_layers(keep, depth)
        return tuple(sorted(set(keep))), None
    if keep.endswith(".json"):
        kept, scores = read_layers(Path(keep).expanduser(), depth)
        check_layers(kept, depth)
        return kept, scores
    matched = POLICY.fullmatch(keep)
    assert matched is not None, keep
    kind, number = matched.groups()
    if kind is None:
        return (), None
    if kind == "every":
        kept = tuple(range(int(number) - 1, depth, int(number)))
        check_layers(kept, depth)
        return kept, None
    check_layers(range(int(number)), depth)
    scores = importance()
    best = sorted(range(depth), key=lambda index: (-scores[index], index))
    return tuple(sorted(best[: int(number)])), scores


def layers_that_stay(layers: Sequence[str]) -> tuple[int, ...]:
    """The numbers of those that are their teacher's softmax attention still, of the mixers' names."""
    return tuple(index for index, name in enumerate(layers) if name in (FULL, WINDOWED))


def write_layers(file: Path, layers: Sequence[str], importance: Sequence[float] | None) -> None:
    """What was chosen, for people and for `keep=FILE.json`: the mixers' names, and what was measured for the choice."""
    chosen = {"keep": layers_that_stay(layers), "layers": layers, "importance": importance}
    write_json(file, chosen)


def read_layers(file: Path, depth: int) -> tuple[tuple[int, ...], list[float] | None]:
    """`(keep, importance)` of a file that `write_layers` wrote, for a model of so many layers. Raises `ConfigError`.

    A file of hand has `keep` alone, a list of numbers from 0.
    """
    try:
        chosen = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"keep={file}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"keep={file}: is no readable JSON: {str(error).splitlines()[0]}") from None
    keep = chosen.get("keep") if isinstance(chosen, dict) else None
    if not isinstance(keep, list) or not all(type(index) is int and index >= 0 for index in keep):
        raise ConfigError(f"keep={file}: must hold an object with keep, a list of layers from 0")
    if len(chosen.get("layers") or [""] * depth) != depth:
        raise ConfigError(f"keep={file}: is of a model with {len(chosen['layers'])} layers, not {depth}")
    return tuple(sorted(set(keep))), chosen.get("importance")


@torch.no_grad()
def restore_one_layer(
    student: LanguageModel, teacher: LanguageModel, tokens: Tensor, progress: Callable[[str], None]
) -> list[float]:
    """How much nearer each layer's own attention brings the all-converted student to its teacher.

    `tokens: int64 [B,T]`. The fall of the mean divergence `KL(teacher | student)`, nats a token, layer by layer.
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
