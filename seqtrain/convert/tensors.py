"""Models whose weights are mapped from disk: nothing is read before it is used, and nothing is held twice."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqtrain.convert.architecture import Architecture
from seqtrain.files import replacing
from seqtrain.models import LanguageModel


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
