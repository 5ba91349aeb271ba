"""Weights on disk that a model is laid over: nothing is read before it is used, and nothing held twice."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seqtrain.convert.architecture import Architecture
from seqtrain.files import replacing
from seqtrain.models import LanguageModel


def model_from(architecture: Architecture, files: Iterable[Path], *, own: Iterable[str] = ()) -> LanguageModel:
    """The network with the weights of `files`; a later file's tensors take the place of an earlier one's.

    Its parameters are mapped from the files, read-only in effect: two models of one file, in any number of processes,
    are in memory once. Those named in `own` are copies that may be changed. Nothing requires a gradient.
    """
    model = architecture.build()
    tensors = mapped(files)
    owned = set(own)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name == "head.weight" and architecture.model.tie_embeddings:
            continue
        module, _, key = name.rpartition(".")
        value = tensors[name]
        assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
        holder: nn.Module = model.get_submodule(module)
        setattr(holder, key, nn.Parameter(value.clone() if name in owned else value, requires_grad=False))
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
