"""Models with weights: of a source, tensor by tensor, nothing left out on either side; or mapped from files."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seqtrain.convert.architecture import Architecture
from seqtrain.convert.families import IGNORED, in_layers
from seqtrain.convert.sources import Source
from seqtrain.errors import CheckpointError
from seqtrain.files import replacing
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models import LanguageModel

PLACE = re.compile(r"(.+?)(?:\[(\w+)\])?")


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


def model_from(architecture: Architecture, files: Iterable[Path], *, own: Iterable[str] = ()) -> LanguageModel:
    """The network with the weights of `files`; a later file's tensors take the place of an earlier one's.

    Its parameters are mapped from the files, read-only in effect: any number of models and processes share them in
    memory. Those named in `own` are copies that may be changed. Nothing requires a gradient.
    """
    model = architecture.build().requires_grad_(False)
    tensors, owned = mapped(files), set(own)
    values = {name: tensors[name].clone() if name in owned else tensors[name] for name, _ in model.named_parameters()}
    if architecture.model.tie_embeddings:
        values["head.weight"] = values["embedding.weight"]
    model.load_state_dict(values, assign=True)
    if architecture.model.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def mapped(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of `files` by name, of the last file that has it, mapped into memory."""
    places: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    found: dict[str, Tensor] = {}
    for file in set(places.values()):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name, place in places.items() if place == file}
    return found


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` as safetensors, whole or not at all."""
    with replacing(file) as unfinished:
        save_file({name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}, unfinished)
