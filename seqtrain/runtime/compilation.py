"""`train.compile`: torch.compile for the model or its regions, in place, so that no parameter is renamed."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.models.feed_forward import MoE

if TYPE_CHECKING:
    from seqtrain.runtime.settings import PretrainConfig

Compile = Literal[False, True, "regions"]


def compile_model(model: nn.Module, how: Compile, *, sharded: bool) -> None:
    """Has `model`, a `LanguageModel`, or its blocks compiled when they are first called.

    `sharded`: whether ranks share sequences: then the regions are MLPs, in which nothing is sent. Blocks of routed
    experts, whose shapes depend on the numbers, stay as they are.
    """
    if not how:
        return
    blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    # A graph for every kind of layer, with gradients and without.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    regions = [model]
    if how == "regions":
        dense = [block for block in blocks if not isinstance(block.mlp, MoE)]
        regions = [block.mlp for block in dense if block.mlp is not None] if sharded else dense  # type: ignore[misc]
    for region in regions:
        region.compile()


def mark_documents(cu_seqlens: Tensor | None) -> None:
    """Lets one graph serve any number of documents."""
    if cu_seqlens is not None:
        torch._dynamo.mark_dynamic(cu_seqlens, 0)


def check_compile(config: "PretrainConfig") -> None:
    """Raises `ConfigError` where the run's layout or model can't be compiled as asked."""
    how, model, parallel = config.train.compile, config.model, config.parallel
    if not how:
        return
    key = f"train.compile={str(how).lower()}"
    if again := sorted(model.recomputed - {"block"}):
        raise ConfigError(
            f"{key}: can't compile model.recompute=[{','.join(again)}]; use model.recompute=[block], or one of the two"
        )
    if model.recomputed and model.recompute_inputs != "float32":
        raise ConfigError(f"{key}: can't compile model.recompute_inputs={model.recompute_inputs}; use float32")
    if parallel.zero_stage == 3:
        raise ConfigError(f"{key}: weights come and go in parallel.zero_stage=3; use parallel.zero_stage=2 or less")
    if how is True and parallel.sequence > 1:
        raise ConfigError(
            f"{key}: ranks share sequences, parallel.sequence={parallel.sequence}; use train.compile=regions"
        )
    if how is True and any(model.mlp(index) == "moe" for index in range(model.depth)):
        raise ConfigError(f"{key}: shapes of routed experts depend on the numbers; use train.compile=regions")
