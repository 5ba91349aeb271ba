"""Models with weights: of a source, tensor by tensor, nothing left out; mapped from files; exported to a folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.files import replacing
from seqtrain.initialization import WHOLE
from seqtrain.models import LanguageModel
from seqtrain.models.architecture import Architecture
from seqtrain.models.families import Piece
from seqtrain.models.feed_forward import MLP, MoE
from seqtrain.models.pretrained import (
    Origin,
    architecture_of,
    copy_companions,
    load_weights,
    origin_as,
    write_folder,
)
from seqtrain.models.source import Source

# What a config says of tokens and lengths.
TOKENS = ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")


def load_teacher(
    source: Source, *, dtype: torch.dtype, progress: Callable[[str], None] = lambda name: None
) -> LanguageModel:
    """The source's own network with its weights."""
    teacher = architecture_of(source).build()
    load_weights(teacher, source, dtype=dtype, progress=progress)
    return teacher.eval()


@torch.no_grad()
def student_on(teacher: LanguageModel, architecture: Architecture, *, seed: int) -> LanguageModel:
    """The network of `architecture` on the very weights of `teacher`, and new ones by each mixer's own rule.

    `seed`: of the new ones. Both are valid until either is trained. A mixer that lacks a parameter of its teacher's
    begins as that layer (`Mixer.init_from_attention`).
    """
    student = architecture.build()
    fresh, theirs = student.initial_weights(seed), dict(teacher.named_parameters())
    replaced = replaced_layers(teacher, student)
    own = tuple(f"blocks.{index}.mixer." for index in replaced)
    shift = float(student.config.norm_zero_centered) - float(teacher.config.norm_zero_centered)
    values: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape and not name.startswith(own):
            shifted = shift and name.endswith("norm.weight") and ".mixer." not in name
            values[name] = theirs[name] - shift if shifted else theirs[name]
        else:
            values[name] = torch.empty(parameter.shape, dtype=teacher.embedding.weight.dtype)
            fresh(name, values[name], WHOLE)
    _give(student, values)
    for index in replaced:
        student.blocks[index].mixer.init_from_attention(teacher.blocks[index].mixer)
    for theirs, mine in zip(teacher.blocks, student.blocks, strict=True):
        if isinstance(mine.mlp, MoE):
            upcycle(mine.mlp, theirs.mlp)
    return student.eval()


@torch.no_grad()
def upcycle(moe: MoE, mlp: MLP) -> None:
    """Makes every expert a copy of `mlp`, so scaled that together they are it, whatever the router says.

    The chosen experts' weights add up to 1, and a shared expert counts 1 more; only what leaves an expert is scaled,
    for its activation is no homogeneous function.
    """
    assert moe.config.normalize
    assert moe.config.scale == 1
    parts = 1 if moe.shared is None else 2
    moe.up.copy_(mlp.up.weight.expand_as(moe.up))
    moe.down.copy_((mlp.out.weight / parts).expand_as(moe.down))
    if moe.shared is not None:
        moe.shared.up.weight.copy_(mlp.up.weight)
        moe.shared.out.weight.copy_(mlp.out.weight / parts)


def replaced_layers(teacher: nn.Module, student: nn.Module) -> tuple[int, ...]:
    """The layers whose mixer lacks a parameter of the teacher's, or has it in another shape."""
    found = []
    for index, blocks in enumerate(zip(teacher.blocks, student.blocks, strict=True)):  # type: ignore[arg-type]
        theirs, mine = ({name: p.shape for name, p in block.mixer.named_parameters()} for block in blocks)
        if theirs.items() - mine.items():
            found.append(index)
    return tuple(found)


def rest_of_teacher(teacher: LanguageModel, student: LanguageModel) -> dict[str, Tensor]:
    """The teacher's parameters that are not also the student's."""
    shared = {parameter.data_ptr() for parameter in student.parameters()}
    return {name: value for name, value in teacher.named_parameters() if value.data_ptr() not in shared}


def _give(model: LanguageModel, values: dict[str, Tensor]) -> None:
    """Makes these the model's parameters; a tied head's is the embedding's."""
    tied = {"head.weight": values["embedding.weight"]} if model.config.tie_embeddings else {}
    model.load_state_dict(values | tied, assign=True)
    if tied:
        model.head.weight = model.embedding.weight


def model_from(architecture: Architecture, files: Iterable[Path], *, own: Iterable[str] = ()) -> LanguageModel:
    """The network with the weights of `files`; a later file's tensors take the place of an earlier one's.

    Its parameters are mapped from the files, read-only in effect: any number of models and processes share them in
    memory. Those named in `own` are copies that may be changed. Nothing requires a gradient.
    """
    model = architecture.build().requires_grad_(False)
    tensors, owned = mapped(files), set(own)
    values = {name: tensors[name].clone() if name in owned else tensors[name] for name, _ in model.named_parameters()}
    _give(model, values)
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


def origin_of_export(student: LanguageModel, target: str, source: Source) -> Origin:
    """What writing a student as the family `target` needs. Raises `ConfigError` where it can't be written."""
    config, rope = source.config, dict(source.config.rope_parameters or {})
    tokens = {name: getattr(config, name) for name in TOKENS}
    return origin_as(student, target, key="target", rope=rope, **tokens)


def export(student: LanguageModel, architecture: Architecture, source: Source, folder: Path, family: str = "") -> None:
    """Writes weights (safetensors), config, tokenizer, chat template and generation config; whole or not at all.

    As seqtrain's own type, or as that of `family`.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    from seqtrain.models.export import as_huggingface

    with replacing(folder) as unfinished:
        unfinished.mkdir()
        if family:
            write_folder(student, origin_of_export(student, family, source), unfinished)
        else:
            tokens = {name: getattr(source.config, name) for name in TOKENS}
            as_huggingface(student, architecture.mixers, **tokens).save_pretrained(unfinished)
        copy_companions(source.path, unfinished, source)


def recipe_targets(model: LanguageModel, targets: Sequence[str]) -> dict[str, list[Piece]]:
    """The rows of each matrix of every block that recipes call one of `targets`: q, k, v, out, gate, up or down."""
    hidden, found = model.config.hidden, {}
    for index, block in enumerate(model.blocks):
        places = {name: (f"mixer.{path}", rows) for name, (path, rows) in block.mixer.projections().items()}
        assert places, f"layer {index} has no projections to take over: {block.mixer}"
        places |= {"gate": ("mlp.up.weight", slice(0, hidden)), "up": ("mlp.up.weight", slice(hidden, 2 * hidden))}
        places |= {"down": ("mlp.out.weight", slice(None))}
        for name in (name for name in places if name in targets):
            path, rows = places[name]
            whole = rows == slice(None)
            found[f"blocks.{index}.{name}"] = [Piece(name, f"blocks.{index}.{path}", None if whole else rows)]
    return found
