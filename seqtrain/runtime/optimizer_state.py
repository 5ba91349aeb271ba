"""Adam's moments by the name of the weight they belong to, whatever ZeRO stage and rank count hold them.

DeepSpeed's own checkpoints have one pickle a rank and stage. Named, whole tensors can be saved as safetensors and
read back on another number of ranks or in another stage.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The names and parameters that the optimizer updates, in the same order on every rank."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def whole_weight(engine: Any, parameter: torch.nn.Parameter) -> Tensor:
    """The float32 weight as one tensor of its full shape. A collective in stage 3."""
    if engine.zero_optimization_stage() < 3:
        return parameter.detach()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def whole_moments(engine: Any, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """Both moments of a weight, in its full shape. A collective in stages 1 to 3; a step must have been taken."""
    if engine.zero_optimization_stage() == 0:
        return {key: engine.optimizer.state[parameter][key] for key in MOMENTS}
    from deepspeed.utils import safe_get_full_optimizer_state

    return {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}


def link_moments(engine: Any) -> None:
    """Lets ZeRO 1 and 2 find the moments of every weight; before they are read or set.

    DeepSpeed does this by itself once, when the first parameter group has been stepped for the first time; the groups
    behind it have no moments yet then, and stay unlinked.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def restore_moments(engine: Any, moments: Iterator[tuple[str, dict[str, Tensor]]], *, steps_taken: int) -> None:
    """Gives the engine's optimizer the moments of every trained weight, by name, and its count of steps."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer.optimizer if stage else engine.optimizer
    by_torch = isinstance(optimizer, torch.optim.AdamW)
    for tensor in _held_tensors(engine, stage):
        zeros = {key: torch.zeros_like(tensor) for key in MOMENTS}
        # torch counts in a tensor, which it changes in place; DeepSpeed's fused kernel in an int.
        optimizer.state[tensor] = {**zeros, "step": torch.tensor(float(steps_taken)) if by_torch else steps_taken}
    link_moments(engine)
    parameters = dict(trained(engine))
    for name, values in moments:
        for key in MOMENTS:
            _set_moment(engine, optimizer, parameters[name], key, values[key])


def _held_tensors(engine: Any, stage: int) -> list[Tensor]:
    """The tensors whose state the inner optimizer keeps on this rank."""
    if stage == 0:
        return [p for _, p in trained(engine)]
    return (
        engine.optimizer.single_partition_of_fp32_groups if stage < 3 else engine.optimizer.fp32_partitioned_groups_flat
    )


def _set_moment(engine: Any, optimizer: Any, parameter: torch.nn.Parameter, key: str, value: Tensor) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        optimizer.state[parameter][key].copy_(value)
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if stage < 3:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # Stage 3 pads a weight to equal pieces, one a rank.
    piece = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    flat = F.pad(value.flatten(), (0, piece * ranks - value.numel()))
    safe_set_local_optimizer_state(parameter, flat[rank * piece : (rank + 1) * piece], key)
