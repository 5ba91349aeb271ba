"""The student: its teacher with recurrent layers in the place of softmax attention, and the weights of both."""

import dataclasses
from collections.abc import Callable, Collection
from itertools import cycle
from typing import Any

import torch

from seqtrain.convert.architecture import WINDOWED, Architecture
from seqtrain.convert.settings import ConvertConfig, is_liger
from seqtrain.convert.sources import Source
from seqtrain.convert.weights import load_weights
from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel

LINEARIZED, STREAMING = "linearized_attention", "streaming_attention"


def student_of(teacher: Architecture, config: ConvertConfig, kept: Collection[int]) -> Architecture:
    """`teacher` with the target's layers everywhere but in `kept`. Raises `ConfigError`."""
    layer, softmax = config.layer, next(iter(teacher.mixers.values()))
    # A layer that never saw further than its own window has no use for a longer one.
    window = layer.window
    if WINDOWED in teacher.mixers:
        window = min(window, teacher.mixers[WINDOWED].window)
    options: dict[str, dict[str, Any]]
    memory = {
        "memory": config.target,
        "sinks": layer.sinks,
        "combine": layer.combine,
        "memory_weight": layer.memory_weight,
        "gate_rank": layer.gate_rank,
        "tied_gate": layer.tied_gate,
        "slots": layer.slots,
    }
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
    return Architecture(dataclasses.replace(teacher.model, layers=layers), used, teacher.vocab_size)


def _taking_over(softmax: Any, name: str, options: dict[str, Any]) -> Any:
    """The config of mixer `name` with the projections of `softmax`, a config too, and `options` of its own."""
    cls = MIXERS.get(name).Config
    shared = {field.name for field in dataclasses.fields(cls)} & {field.name for field in dataclasses.fields(softmax)}
    return cls(**{field: getattr(softmax, field) for field in shared - set(options)}, **options)


def load_student(
    architecture: Architecture,
    source: Source,
    *,
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[str], None] = lambda name: None,
) -> LanguageModel:
    """The network with the source's weights, and new ones by each mixer's own rule from `seed`."""
    student = architecture.build()
    load_weights(student, source, dtype=dtype, progress=progress)
    generator = torch.Generator().manual_seed(seed)
    for block in student.blocks:
        block.mixer.reset_parameters(generator)  # type: ignore[operator, union-attr]
    empty = [name for name, parameter in student.named_parameters() if parameter.isnan().any()]
    assert not empty, f"no reset_parameters filled {empty}"
    return student.eval()


def teacher_sharing(student: LanguageModel, architecture: Architecture) -> LanguageModel:
    """The network of `architecture` on the very weights of `student`: valid until those are trained."""
    teacher = architecture.build()
    own = dict(student.named_parameters(remove_duplicate=False))
    teacher.load_state_dict({name: own[name] for name in teacher.state_dict()}, assign=True)
    return teacher.eval()


def check_layers(kept: Collection[int], depth: int) -> None:
    """Raises `ConfigError` for a layer that does not exist, or where all layers would stay as they are."""
    if beyond := [index for index in kept if index >= depth]:
        raise ConfigError(f"keep={sorted(kept)}: the model has layers 0 to {depth - 1}, not {beyond[0]}")
    if len(set(kept)) == depth:
        raise ConfigError(f"keep={sorted(kept)}: leaves no layer to convert; keep fewer than {depth}")
