"""Filling a model from a source, tensor by tensor, and proving that nothing was left out on either side."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from seqtrain.convert.families import IGNORED, in_layers
from seqtrain.convert.sources import Source
from seqtrain.errors import CheckpointError
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models import LanguageModel

PLACE = re.compile(r"(.+?)(?:\[(\w+)\])?")


@torch.no_grad()
def load_weights(
    model: LanguageModel, source: Source, *, dtype: torch.dtype, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Gives `model`, built on the meta device, memory and the source's weights.

    Parameters the source does not have (those of a replaced layer) are NaN until they are filled. Peak memory: the
    model in `dtype` and one tensor. Raises `CheckpointError` for a tensor that is missing, unknown, or has another
    shape than the model's.
    """
    places = _places(model, source)
    _check_names(model, source, places)
    give_memory(model, dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied_head = None
    for name, tensor in source.tensors():
        progress(name)
        if name == "lm_head.weight" and model.config.tie_embeddings:
            tied_head = tensor
        elif name in places:
            parameter, rows = places[name]
            parameters[parameter][rows].copy_(tensor)
    if tied_head is not None and not torch.equal(model.embedding.weight, tied_head.to(dtype)):
        raise CheckpointError(f"source={source.path}: lm_head.weight differs from the embedding the config ties it to")


def give_memory(model: LanguageModel, dtype: torch.dtype) -> None:
    """Moves a model from the meta device to the CPU, its parameters NaN; what was tied stays tied."""
    model.to(dtype).to_empty(device="cpu")
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)


def _places(model: LanguageModel, source: Source) -> dict[str, tuple[str, slice]]:
    """Where each named tensor of the source belongs: a parameter and its rows."""
    layout = fused_rows(model)
    places = {}
    for name, place in in_layers(source.family.weights, model.config.depth).items():
        matched = PLACE.fullmatch(place)
        assert matched is not None, place
        parameter, part = matched.groups()
        places[name] = (parameter, slice(None) if part is None else layout[parameter.rpartition(".")[0]][part])
    return places


def fused_rows(model: LanguageModel) -> dict[str, dict[str, slice]]:
    """For each fused matrix, the rows of its parts by name."""
    rows: dict[str, dict[str, slice]] = {}
    for index, block in enumerate(model.blocks):
        mixer: nn.Module = block.mixer  # type: ignore[assignment]
        assert isinstance(mixer, SoftmaxAttention), f"layer {index} has no projections to take over: {mixer}"
        rows[f"blocks.{index}.mixer.qkv"] = _cut(("q", "k", "v"), mixer.channels)
        rows[f"blocks.{index}.mlp.up"] = _cut(("gate", "value"), [model.config.hidden] * 2)
    return rows


def _cut(names: Iterable[str], sizes: Iterable[int]) -> dict[str, slice]:
    parts, start = {}, 0
    for name, size in zip(names, sizes, strict=True):
        parts[name] = slice(start, start + size)
        start += size
    return parts


def _check_names(model: LanguageModel, source: Source, places: Mapping[str, tuple[str, slice]]) -> None:
    """Raises `CheckpointError` unless the source's tensors are those of the table, in the model's shapes."""
    optional = {"lm_head.weight"} if model.config.tie_embeddings else set()
    ignored = in_layers(dict.fromkeys(IGNORED, ""), model.config.depth)
    if missing := sorted(set(places) - set(source.shapes) - optional):
        raise CheckpointError(f"source={source.path}: lacks {_some(missing)}")
    if unknown := sorted(set(source.shapes) - set(places) - set(ignored)):
        raise CheckpointError(f"source={source.path}: holds {_some(unknown)}, which its architecture does not have")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, (parameter, rows) in places.items():
        if name in source.shapes and source.shapes[name] != (expected := tuple(parameters[parameter][rows].shape)):
            raise CheckpointError(f"source={source.path}: {name} has shape {source.shapes[name]}, expected {expected}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
