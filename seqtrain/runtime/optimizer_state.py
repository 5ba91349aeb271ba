"""An optimizer's moments by the name of the weight they belong to, whatever ZeRO stage and rank count hold them.

DeepSpeed's own checkpoints have one pickle per rank and stage. Named, whole tensors can be saved as safetensors and
read back on another number of ranks or in another stage.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqtrain.runtime.expert_parallel import ExpertParallel
from seqtrain.runtime.optimizers import OPTIMIZERS, OptimizerConfig

Moments = dict[str, Tensor]


class OptimizerState:
    """The state inside the optimizer of a DeepSpeed engine of ZeRO `stage`; only this class reads and writes it."""

    def __init__(self, engine: Any, stage: int, config: OptimizerConfig, experts: ExpertParallel):
        """`experts`: of which weights this rank has its experts' part."""
        self.moments = OPTIMIZERS[config.name].moments
        self._by_torch = config.implementation == "torch"
        self._stage, self._expert_parallel = stage, experts
        self._zero = engine.optimizer
        # The optimizer that ZeRO wraps.
        self._inner = engine.optimizer.optimizer if stage else engine.optimizer
        self._parameters: dict[str, nn.Parameter] = {
            name: p for name, p in engine.module.named_parameters() if p.requires_grad
        }

    @property
    def names(self) -> list[str]:
        """The parameters that the optimizer updates, in the same order on every rank."""
        return list(self._parameters)

    def whole(self, name: str) -> Moments:
        """The moments of a weight, in its full shape. A collective in stages 1 to 3; a step must have been taken."""
        parameter = self._parameters[name]
        if self._stage == 0:
            found = {key: self._inner.state[parameter][key] for key in self.moments}
        else:
            from deepspeed.utils import safe_get_full_optimizer_state

            found = {key: safe_get_full_optimizer_state(parameter, key) for key in self.moments}
        return {key: self._expert_parallel.whole(name, value) for key, value in found.items()}

    def link(self) -> None:
        """Lets ZeRO 1 and 2 find the moments of every weight; before they are read or set.

        DeepSpeed does this by itself once, when the first parameter group has been stepped for the first time; the
        groups after it have no moments yet then, and stay unlinked.
        """
        if self._stage in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def restore(self, moments: Iterable[tuple[str, Moments]], *, steps_taken: int) -> None:
        """Gives the optimizer the moments of every trained weight, by name, and its count of steps."""
        held: Iterable[Tensor] = self._parameters.values()
        if self._stage:
            zero = self._zero
            held = zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat
        for tensor in held:
            zeros = {key: torch.zeros_like(tensor) for key in self.moments}
            # torch counts in a tensor, which it changes in place; DeepSpeed's fused kernel in an int.
            count = torch.tensor(float(steps_taken)) if self._by_torch else steps_taken
            self._inner.state[tensor] = {**zeros, "step": count}
        self.link()
        for name, values in moments:
            for key in self.moments:
                self._set(self._parameters[name], key, self._expert_parallel.own(name, values[key]))

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self._inner.state[parameter][key].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Stage 3 pads a weight to equal pieces, one per rank.
        piece = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        flat = F.pad(value.flatten(), (0, piece * ranks - value.numel()))
        safe_set_local_optimizer_state(parameter, flat[rank * piece : (rank + 1) * piece], key)
