"""Models with weights: of a source, tensor by tensor, nothing left out; mapped from files; exported to a folder.

LoRA adapters (arXiv 2106.09685) are peft's, on the parts of fused matrices too; they are merged in float32.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.files import replacing
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models import LanguageModel
from seqtrain.models.architecture import Architecture
from seqtrain.models.pretrained import copy_companions, load_weights
from seqtrain.models.source import Source

# By the name a recipe calls it: the module of a block, or the part of a fused one.
TARGETS: Mapping[str, str] = {
    **{name: f"mixer.qkv.{name}" for name in ("q", "k", "v")},
    "out": "mixer.out",
    "gate": "mlp.up.gate",
    "up": "mlp.up.value",
    "down": "mlp.out",
}


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
        block.mixer.reset_parameters(generator)
    empty = [name for name, parameter in student.named_parameters() if parameter.isnan().any()]
    assert not empty, f"no reset_parameters filled {empty}"
    return student.eval()


def teacher_sharing(student: LanguageModel, architecture: Architecture) -> LanguageModel:
    """The network of `architecture` on the very weights of `student`: valid until those are trained."""
    teacher = architecture.build()
    own = dict(student.named_parameters(remove_duplicate=False))
    teacher.load_state_dict({name: own[name] for name in teacher.state_dict()}, assign=True)
    return teacher.eval()


def fused_rows(model: LanguageModel) -> dict[str, dict[str, slice]]:
    """For each fused matrix, the rows of its parts by name."""
    rows: dict[str, dict[str, slice]] = {}
    hidden = model.config.hidden
    for index, block in enumerate(model.blocks):
        mixer: nn.Module = block.mixer
        assert isinstance(mixer, SoftmaxAttention), f"layer {index} has no projections to take over: {mixer}"
        parts = zip(("q", "k", "v"), pairwise(accumulate(mixer.channels, initial=0)), strict=False)
        rows[f"blocks.{index}.mixer.qkv"] = {name: slice(*part) for name, part in parts}
        rows[f"blocks.{index}.mlp.up"] = {"gate": slice(0, hidden), "value": slice(hidden, 2 * hidden)}
    return rows


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


class Parts(nn.Module):
    """A fused matrix as one `nn.Linear` for each of its parts, which share its memory: peft adapts whole modules."""

    def __init__(self, fused: nn.Linear, rows: Mapping[str, slice]):
        super().__init__()
        self.names = tuple(rows)
        for name, part in rows.items():
            with torch.device("meta"):
                linear = nn.Linear(fused.in_features, part.stop - part.start, bias=fused.bias is not None)
            linear.weight = nn.Parameter(fused.weight.detach()[part], requires_grad=False)
            if fused.bias is not None:
                linear.bias = nn.Parameter(fused.bias.detach()[part], requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in self.names], -1)


def add_adapters(model: LanguageModel, *, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Puts an adapter on each of `targets` in every block; afterwards they alone require gradients.

    `A` is drawn from torch's own generator, `B` is zero: the model computes what it did. Raises `ConfigError`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("recipe: trainable=lora needs peft: pip install 'seqtrain[convert]'") from None
    names = [f"blocks.{index}.{TARGETS[target]}" for index in range(len(model.blocks)) for target in targets]
    for name, rows in fused_rows(model).items():
        if any(target.startswith(f"{name}.") for target in names):
            parent, _, child = name.rpartition(".")
            fused: Any = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, Parts(fused, rows))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model)


@torch.no_grad()
def merged_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The model's weights under the names it had before `add_adapters`, each adapter added to its matrix in float32."""
    from peft.tuners.lora import Linear as LoraLinear

    found: dict[str, Tensor] = {}
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    for name, parameter in model.named_parameters():
        owner = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if owner is None:
            found[name] = parameter
        elif name == f"{owner}.base_layer.weight":
            found[f"{owner}.weight"] = parameter.float() + adapted[owner].get_delta_weight("default").float()
        elif name == f"{owner}.base_layer.bias":
            found[f"{owner}.bias"] = parameter
    for name, module in list(model.named_modules()):
        if isinstance(module, Parts):
            for kind in ("weight", "bias"):
                parts = [found.pop(f"{name}.{part}.{kind}", None) for part in module.names]
                if held := [part for part in parts if part is not None]:
                    found[f"{name}.{kind}"] = torch.cat(held)
    return found
