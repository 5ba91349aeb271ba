"""The networks of a conversion: the teacher as a `LanguageModel` with softmax mixers, its student, and what stays."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.convert.settings import POLICY, ConvertConfig, is_liger
from seqtrain.errors import ConfigError
from seqtrain.files import Manifest
from seqtrain.mixers import MIXERS, WHOLE
from seqtrain.mixers.linearized_attention import MemoryConfig
from seqtrain.models import LanguageModel, pretrained
from seqtrain.models.architecture import Architecture
from seqtrain.models.families import FAMILIES, family_of, is_servable
from seqtrain.models.families.dense import FULL, WINDOWED, Dense
from seqtrain.models.source import Source
from seqtrain.parallel.sequence import SequenceContext

LINEARIZED, STREAMING = "linearized_attention", "streaming_attention"


def architecture_of(source: Source, tokens: int | None = None) -> Architecture:
    """The teacher, for rows of `tokens`. Raises `ConfigError` for what can't be converted."""
    if not isinstance(source.family, Dense):
        known = ", ".join(name for name, module in FAMILIES.items() if module == "dense")
        raise ConfigError(f"source={source.path}: {source.config.model_type} can't be converted; these can: {known}")
    return pretrained.architecture_of(source, tokens)


@dataclass(frozen=True)
class LayerChoice(Manifest):
    """`layers.json`: the layers that keep softmax attention, all mixers' names, and the scores of the choice."""

    error = ConfigError
    remedy = "keep takes the layers.json of a conversion, or an object with keep, a list of layers from 0"

    keep: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    layers: list[str] | None = None
    importance: list[float] | None = None
    # Every score that was measured, layer by layer, by its name.
    scores: dict[str, list[float]] = field(default_factory=dict)


def kept_layers(
    keep: str | tuple[int, ...], depth: int, importance: Callable[[], list[float]], *, every: bool = False
) -> tuple[tuple[int, ...], list[float] | None]:
    """The numbers of the layers that stay, rising, and each layer's importance where it was measured.

    `keep`: as `ConvertConfig.keep`. `importance`: measures each layer, called for a budget only. `every`: all may stay.
    Raises `ConfigError`.
    """
    scores, shown = None, keep if isinstance(keep, str) else sorted(keep)
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
    if beyond := [index for index in kept if index >= depth]:
        many = isinstance(keep, str) and keep.startswith("budget:")
        what = f"the model has {depth} layers" if many else f"the model has layers 0 to {depth - 1}, not {beyond[0]}"
        raise ConfigError(f"keep={shown}: {what}")
    if len(set(kept)) == depth and not every:
        raise ConfigError(f"keep={shown}: leaves no layer to convert; keep fewer than {depth}")
    if isinstance(keep, str) and keep.startswith("budget:"):
        scores = measured = importance()
        kept = tuple(sorted(range(depth), key=lambda index: (-measured[index], index))[: len(kept)])
    return tuple(sorted(set(kept))), scores


def layers_that_stay(layers: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the layers that are still softmax attention, of the mixers' names."""
    return tuple(index for index, name in enumerate(layers) if name in (FULL, WINDOWED))


def write_layers(
    file: Path, layers: Sequence[str], importance: list[float] | None, scores: Mapping[str, list[float]]
) -> None:
    """Writes what was chosen, for people and for `keep=FILE.json`."""
    LayerChoice(layers_that_stay(layers), list(layers), importance, dict(scores)).write(file)


def student_of(teacher: Architecture, config: ConvertConfig, kept: Collection[int]) -> Architecture:
    """`teacher` with the target's layers everywhere but in `kept`. Raises `ConfigError`."""
    if is_servable(config.target):
        try:
            return family_of(config.target, "target").hybrid_of(teacher, kept)
        except ConfigError as error:
            raise ConfigError(f"target={config.target}: {error}") from None
    layer, softmax = config.layer, next(iter(teacher.mixers.values()))
    # A layer that never saw further than its own window has no use for a longer one.
    window = layer.window
    if WINDOWED in teacher.mixers:
        window = min(window, teacher.mixers[WINDOWED].window)
    options: dict[str, dict[str, Any]]
    memory = {"memory": config.target} | {each.name: getattr(layer, each.name) for each in fields(MemoryConfig)}
    if is_liger(config.target):
        options = {config.target: {"window": window}}
    elif layer.arrangement == "alternate":
        options = {LINEARIZED: memory | {"window": 0}, STREAMING: {"window": window, "sinks": layer.sinks}}
    else:
        options = {LINEARIZED: memory | {"window": window}}
    names = cycle(options)
    layers = tuple(old if index in kept else next(names) for index, old in enumerate(teacher.model.layers))
    mixers = {**teacher.mixers, **{name: _taking_over(softmax, name, own) for name, own in options.items()}}
    used = {each: mixers[each] for each in sorted(set(layers))}
    upcycle = config.upcycle
    experts: dict[str, Any] = {}
    if upcycle.experts:
        hidden = teacher.model.hidden
        experts = {"experts": upcycle.experts, "experts_per_token": upcycle.experts_per_token, "expert_width": hidden}
        experts["shared_expert_width"] = hidden if upcycle.shared else 0
    return Architecture(replace(teacher.model, layers=layers, **experts), used, teacher.vocab_size)


def changes(teacher: Architecture, student: Architecture) -> dict[int, str]:
    """For each layer that stays softmax attention but computes otherwise than its teacher's: what it has or lacks."""
    found = {}
    for index in layers_that_stay(student.model.layers):
        theirs, mine = (each.mixers[each.model.layers[index]] for each in (teacher, student))
        if theirs.qk_norm != mine.qk_norm:
            verb = "has" if mine.qk_norm else "lacks"
            found[index] = f"{verb} norms of queries and keys"
    return found


def computed_otherwise(teacher: Architecture, student: Architecture) -> tuple[int, ...]:
    """The layers that are not the teacher's: converted, or changed by what their family's attention has or lacks."""
    kinds = enumerate(zip(teacher.model.layers, student.model.layers, strict=True))
    changed = changes(teacher, student)
    return tuple(index for index, (theirs, mine) in kinds if theirs != mine or index in changed)


@torch.no_grad()
def layers_alone(
    teacher: LanguageModel, x: Tensor, layers: range, sequence: SequenceContext = WHOLE
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each of `layers` its number, what its mixer is given, and what that puts out, both `[B,T,D]`.

    `x`: int64 `[B,T]`, tokens, or what enters the first of `layers`, float `[B,T,D]`.
    """
    x = x if x.is_floating_point() else teacher.embedding(x)
    for index in layers:
        block: Any = teacher.blocks[index]
        given = block.mixer_norm(x)
        out, _ = block.mixer(given, sequence=sequence)
        yield index, given, out
        if index != layers[-1]:
            x = x + out
            x = x + block.mlp(block.mlp_norm(x))


def _taking_over(softmax: Any, name: str, options: dict[str, Any]) -> Any:
    """The config of mixer `name` with the projections of `softmax`, a config too, and `options` of its own."""
    cls = MIXERS.get(name).Config
    shared = {each.name for each in fields(cls)} & {each.name for each in fields(softmax)}
    return cls(**{name: getattr(softmax, name) for name in shared - set(options)}, **options)
