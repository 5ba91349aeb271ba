"""Low-rank adapters (LoRA, arXiv 2106.09685) on matrices or on rows of fused ones, and the files PEFT has them in.

An adapter belongs to a matrix as others name it, `W [out,in]`, whose rows lie in one or several of ours; it adds
`alpha / rank * B A` to it, `A: [rank,in]`, `B: [out,rank]`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.initialization import Initializer, constant, initialize, uniform
from seqtrain.kernels import products
from seqtrain.layers import Linear
from seqtrain.models.families import Family, Piece
from seqtrain.models.feed_forward import MoE, SwiGLULinear
from seqtrain.models.language_model import LanguageModel
from seqtrain.models.pretrained import by_tensor, shape_of
from seqtrain.models.shared import SharedBlock

# An adapter's matrices by the name of the module they belong to, as the pieces of that module's weight say.
Targets = Mapping[str, Sequence[Piece]]


@dataclass(frozen=True)
class LoraConfig:
    """The keys under `lora.`: adapters that are trained in place of the source's weights, which stay as they are."""

    # Rank of the adapters; 0: none, all weights are trained.
    rank: Annotated[int, Field(ge=0, le=2**16)] = 0
    # An adapter's product is multiplied with alpha / rank.
    alpha: Annotated[int, Field(gt=0)] = 16
    # Matrices that have an adapter, by the last part of their Hugging Face names, as in [q_proj, v_proj]; all: each
    # that can have one.
    targets: Literal["all"] | tuple[str, ...] = "all"


class Adapter(nn.Module):
    """`x: [...,in]` -> `alpha / rank * B A x: [...,out]`; `name`: of the module it belongs to.

    `A` is drawn as PEFT draws it, `B` is zero: at first the product is.
    """

    def __init__(self, name: str, inputs: int, outputs: int, *, rank: int, alpha: int):
        super().__init__()
        self.name, self.rank, self.alpha = name, rank, alpha
        self.lora_A = Linear(inputs, rank, bias=False)
        self.lora_B = Linear(rank, outputs, bias=False)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        bound = self.lora_A.in_features**-0.5
        return {self.lora_A.weight: uniform(-bound, bound), self.lora_B.weight: constant(0.0)}

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x)) * (self.alpha / self.rank)

    def product(self) -> Tensor:
        """What it adds to the matrix, in float32."""
        return self.lora_B.weight.float() @ self.lora_A.weight.float() * (self.alpha / self.rank)


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` that keeps its parameters and their names, and the adapters on its rows."""

    def __init__(self, base: nn.Linear):
        nn.Module.__init__(self)
        if isinstance(base, SwiGLULinear):
            raise ConfigError(
                "model.mlp_epilogue=true: leaves adapters no place between product and activation; use false"
            )
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapters: Any = nn.ModuleDict()
        self.pieces: list[Piece] = []

    def add(self, adapter: Adapter, pieces: Sequence[Piece]) -> None:
        """Puts `adapter` on the rows that `pieces` name."""
        self.adapters[adapter.name.rpartition(".")[2]] = adapter
        self.pieces += pieces
        self.pieces.sort(key=lambda piece: _rows(piece, self).start)

    def forward(self, x: Tensor) -> Tensor:
        added = {name: adapter(x) for name, adapter in self.adapters.items()}
        return products.linear(x, self.weight, self.bias) + self._in_place(added, -1)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The matrix with the adapters' products, added in float32."""
        added = {name: adapter.product() for name, adapter in self.adapters.items()}
        return self.weight.float() + self._in_place(added, 0)

    def _in_place(self, added: Mapping[str, Tensor], dim: int) -> Tensor:
        """Rows of the adapters' products, along `dim`, where they belong; zeros elsewhere.

        One sum over all rows: sums in place would copy the whole gradient once for each.
        """
        example, end = next(iter(added.values())), 0
        parts: list[Tensor] = []

        def skip(rows: int) -> None:
            if rows:
                shape = list(example.shape)
                shape[dim] = rows
                parts.append(example.new_zeros(shape))

        for piece in self.pieces:
            product, rows = added[_module(piece.theirs).rpartition(".")[2]], _rows(piece, self)
            skip(rows.start - end)
            theirs = piece.their_rows
            if isinstance(theirs, slice):
                product = product[theirs] if dim == 0 else product[..., theirs]
            elif theirs is not None:
                product = product.index_select(dim, theirs.to(product.device))
            parts.append(product)
            end = rows.stop
        skip(self.out_features - end)
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _rows(piece: Piece, linear: nn.Linear) -> slice:
    """The rows of `linear` that `piece` fills, from a number to a number."""
    rows = slice(None) if piece.our_rows is None else piece.our_rows
    assert isinstance(rows, slice), piece
    return slice(*rows.indices(linear.out_features)[:2])


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def targets_of(model: LanguageModel, family: Family, config: Any) -> dict[str, list[Piece]]:
    """The matrices of a model of `family`, which transformers' `config` describes, that can have an adapter.

    They are those whose rows are rows of an `nn.Linear` of ours, but for routers, which are computed otherwise, blocks
    that layers share, and what the family says; by the names of transformers' modules.
    """
    without = {id(module.router) for module in model.modules() if isinstance(module, MoE)}
    shared = (module for module in model.modules() if isinstance(module, SharedBlock))
    without |= {id(part) for block in shared for part in block.modules()}
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in without
    }
    found = {}
    for name, pieces in by_tensor(family.pieces(config, model)).items():
        simple = all(each.ours in linears and not (each.lifted or each.shape) for each in pieces)
        if name.endswith(".weight") and simple and not _module(name).endswith(family.unadapted):
            found[_module(name)] = pieces
    return found


def chosen(there: Targets, targets: str | Sequence[str], where: object) -> dict[str, Sequence[Piece]]:
    """Those of `there` that `targets`, of a `LoraConfig`, names. Raises `ConfigError` for a name that none has."""
    names = dict.fromkeys(name.rpartition(".")[2] for name in there)
    wanted = tuple(names) if targets == "all" else targets
    if wrong := [name for name in wanted if name not in names] or ([] if wanted else ["[]"]):
        raise ConfigError(
            f"lora.targets={wrong[0]}: is no matrix of source={where} that can have an adapter; these are: "
            f"{', '.join(names)}"
        )
    return {name: pieces for name, pieces in there.items() if name.rpartition(".")[2] in wanted}


def add_adapters(model: nn.Module, targets: Targets, *, rank: int, alpha: int) -> None:
    """Puts an adapter on each of `targets`; afterwards they alone require gradients, and nothing else is changed."""
    model.requires_grad_(False)
    for name, pieces in targets.items():
        linears = {path: _adapted(model, path) for path in (_module(piece.ours) for piece in pieces)}
        outputs, inputs = shape_of(list(pieces), {f"{path}.weight": each.weight for path, each in linears.items()})
        weight = next(iter(linears.values())).weight
        with weight.device:
            adapter = Adapter(name, inputs, outputs, rank=rank, alpha=alpha).to(weight.dtype)
        for path, linear in linears.items():
            linear.add(adapter, [piece for piece in pieces if _module(piece.ours) == path])


def _adapted(model: nn.Module, path: str) -> AdaptedLinear:
    """The module at `path`, made one that can have adapters."""
    linear = model.get_submodule(path)
    if not isinstance(linear, AdaptedLinear):
        linear = AdaptedLinear(linear)  # type: ignore[arg-type]
        model.set_submodule(path, linear)
    return linear


def merge_adapters(model: nn.Module) -> None:
    """Adds each adapter to its matrix, in float32, and takes it away."""
    for path, linear in list(model.named_modules()):
        if isinstance(linear, AdaptedLinear):
            with torch.device("meta"):
                plain = Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            plain.weight, plain.bias = nn.Parameter(linear.merged(), requires_grad=False), linear.bias
            model.set_submodule(path, plain)


def write_adapter(model: LanguageModel, family: Family, config: Any, folder: Path, *, base: str) -> None:
    """Writes the adapters of `model` into `folder` as PEFT has them: `PeftModel.from_pretrained` loads them.

    `family`, `config`: as in `targets_of`. `base`: where the model they are for lies.
    """
    adapters: dict[str, Any] = {module.name: module for module in model.modules() if isinstance(module, Adapter)}
    tensors = {
        f"base_model.model.{name}.{part}.weight": adapter.get_submodule(part).weight.detach().contiguous()
        for name, adapter in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    example = next(iter(adapters.values()))
    others = {_module(name) for name in by_tensor(family.pieces(config, model))} - set(adapters)
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": example.rank,
        "lora_alpha": example.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(_shortest(adapters, others)),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _shortest(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """The last part of each name, or the whole one where one of `others` ends in that part too: PEFT takes ends."""
    taken = {name.rpartition(".")[2] for name in others}
    return {name if (last := name.rpartition(".")[2]) in taken else last for name in names}
