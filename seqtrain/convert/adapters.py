"""LoRA adapters (arXiv 2106.09685) by peft, on the parts of fused matrices too, and their merging in float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.convert.weights import fused_rows
from seqtrain.errors import ConfigError
from seqtrain.models import LanguageModel

# By the name a recipe calls it: the module of a block, and the part of a fused matrix.
TARGETS: Mapping[str, tuple[str, str]] = {
    "q": ("mixer.qkv", "q"),
    "k": ("mixer.qkv", "k"),
    "v": ("mixer.qkv", "v"),
    "out": ("mixer.out", ""),
    "gate": ("mlp.up", "gate"),
    "up": ("mlp.up", "value"),
    "down": ("mlp.out", ""),
}


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
    layout, names = fused_rows(model), []
    for index in range(len(model.blocks)):
        for target in targets:
            place, part = TARGETS[target]
            name = f"blocks.{index}.{place}"
            names.append(f"{name}.{part}" if part else name)
    for name, rows in layout.items():
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
