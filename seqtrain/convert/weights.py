"""Models with weights: of a source, tensor by tensor, nothing left out; mapped from files; exported to a folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.files import replacing
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models import LanguageModel
from seqtrain.models.architecture import Architecture
from seqtrain.models.families import Piece
from seqtrain.models.pretrained import copy_companions, load_weights
from seqtrain.models.source import Source


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
    load_weights(student, source, dtype=dtype, seed=seed, progress=progress)
    return student.eval()


def teacher_sharing(student: LanguageModel, architecture: Architecture) -> LanguageModel:
    """The network of `architecture` on the very weights of `student`: valid until those are trained."""
    teacher = architecture.build()
    own = dict(student.named_parameters(remove_duplicate=False))
    teacher.load_state_dict({name: own[name] for name in teacher.state_dict()}, assign=True)
    return teacher.eval()


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
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` as safetensors, whole or not at all."""
    with replacing(file) as unfinished:
        save_file({name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}, unfinished)


def refuse_existing(folder: Path) -> None:
    """Raises `ConfigError` where `folder` exists: no model is overwritten."""
    if folder.exists():
        raise ConfigError(f"output_dir={folder.parent}: holds a model already ({folder.name}); use another output_dir")


def export(student: LanguageModel, architecture: Architecture, source: Source, folder: Path) -> None:
    """Writes weights (safetensors), config, tokenizer, chat template and generation config; whole or not at all."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    from seqtrain.models.export import as_huggingface

    names = ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    tokens = {name: getattr(source.config, name) for name in names}
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        as_huggingface(student, architecture.mixers, **tokens).save_pretrained(unfinished)
        copy_companions(source.path, unfinished)


def recipe_targets(model: LanguageModel, targets: Sequence[str]) -> dict[str, list[Piece]]:
    """The rows of each matrix of every block that recipes call one of `targets`: q, k, v, out, gate, up or down."""
    hidden, found = model.config.hidden, {}
    for index, block in enumerate(model.blocks):
        mixer: nn.Module = block.mixer
        assert isinstance(mixer, SoftmaxAttention), f"layer {index} has no projections to take over: {mixer}"
        parts = zip(("q", "k", "v"), pairwise(accumulate(mixer.channels, initial=0)), strict=False)
        places: dict[str, tuple[str, slice | None]] = {name: ("mixer.qkv", slice(*part)) for name, part in parts}
        places |= {"out": ("mixer.out", None), "gate": ("mlp.up", slice(0, hidden))}
        places |= {"up": ("mlp.up", slice(hidden, 2 * hidden)), "down": ("mlp.out", None)}
        for name in (name for name in places if name in targets):
            path, rows = places[name]
            found[f"blocks.{index}.{name}"] = [Piece(name, f"blocks.{index}.{path}.weight", rows)]
    return found
