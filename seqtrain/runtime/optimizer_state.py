"""An optimizer's moments by the name of the weight they belong to, whatever ZeRO stage and rank count hold them.

DeepSpeed's own checkpoints have one pickle per rank and stage. Named, whole tensors can be saved as safetensors and
read back on another number of ranks or in another stage.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqtrain.runtime.expert_parallel import ExpertParallel
from seqtrain.runtime.optimizers import OPTIMIZERS, OptimizerConfig, StepOfSome
from seqtrain.runtime.whole_matrices import WholeMatrices
from seqtrain.runtime.zero import Replicas

# Of an optimizer that averages: the weights in training, where a checkpoint's are the averaged ones.
IN_TRAINING = "y"
Moments = dict[str, Tensor]


class OptimizerState:
    """The state inside the optimizer of a DeepSpeed engine of ZeRO `stage`; only this class reads and writes it."""

    def __init__(
        self, engine: Any, stage: int, config: OptimizerConfig, experts: ExpertParallel, replicas: Replicas | None
    ):
        """`experts`: of which weights this rank has its experts' part."""
        self._repeats = replicas is not None and not replicas.first
        self._optimizer, self._config = OPTIMIZERS[config.name], config
        self._stage, self._expert_parallel = stage, experts
        self._zero, self._device = engine.optimizer, engine.device
        # The optimizer that ZeRO wraps.
        self._inner = engine.optimizer.optimizer if stage else engine.optimizer
        self._held = self._inner.held if isinstance(self._inner, WholeMatrices) else {}
        matrices = {block.weight for held in self._held.values() for block in held.blocks}
        self._trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        # Those that the optimizer updates number by number.
        self._parameters = {name: p for name, p in self._trained.items() if name not in matrices}

    @property
    def names(self) -> list[str]:
        """The weights that the optimizer updates, in the same order on every rank."""
        return list(self._trained)

    def own(self, rank: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
        """What this rank saves, as `NAME:KEY`, a weight's name and the state's, with its value.

        Of a weight that consists of matrices each has a state of its own, `NAME:NUMBER.KEY`. A collective; a step must
        have been taken.
        """
        self._link()
        for index, name in enumerate(self._parameters):
            whole = self._whole(name)
            if index % ranks == rank:
                yield from ((f"{name}:{key}", value) for key, value in whole.items())
        for held in () if self._repeats else self._held.values():
            for block, optimizer in held.owned:
                for key, value in optimizer.state().items():
                    yield f"{block.weight}:{block.number}.{key}", value

    def _whole(self, name: str) -> Moments:
        """The state of a weight, each tensor in its full shape. A collective in stages 1 to 3."""
        parameter = self._parameters[name]
        whole = {key: self._moment(parameter, key) for key in self._optimizer.moments}
        if self._optimizer.averages:
            from deepspeed.utils import safe_get_full_fp32_param

            whole[IN_TRAINING] = safe_get_full_fp32_param(parameter) if self._stage else parameter.detach()
        whole = {key: self._expert_parallel.whole(name, value) for key, value in whole.items()}
        numbers = {key: self._inner.param_groups[0][key] for key in self._optimizer.numbers}
        return whole | {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}

    def _moment(self, parameter: nn.Parameter, key: str) -> Any:
        """In the full shape of `parameter`, which may be this rank's experts'."""
        if self._stage == 0:
            return self._inner.state[parameter][key]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def _link(self) -> None:
        """Lets ZeRO 1 and 2 find the moments of every weight; before they are read or set.

        DeepSpeed does this by itself once, when the first parameter group has been stepped for the first time; the
        groups after it have no moments yet then, and stay unlinked.
        """
        if self._stage in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def restore(self, states: Iterable[tuple[str, Moments]], *, steps_taken: int) -> None:
        """Gives the optimizer what `own` gave, by weight and in any pieces, and its count of steps."""
        held: Iterable[Tensor] = self._parameters.values()
        if self._stage:
            zero = self._zero
            held = zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat
        for tensor in held:
            if tensor not in self._held:
                zeros = {key: torch.zeros_like(tensor) for key in self._optimizer.moments}
                # torch counts in a tensor, which it changes in place; DeepSpeed's fused kernel in an int.
                count = torch.tensor(float(steps_taken)) if self._config.implementation == "torch" else steps_taken
                self._inner.state[tensor] = {**zeros, "step": count}
        if isinstance(self._inner, StepOfSome):
            for group in self._inner.param_groups:
                group["step"] = steps_taken
        self._link()
        missing = {(block.weight, block.number): each for held in self._held.values() for block, each in held.updated}
        for name, state in states:
            if name in self._parameters:
                self._restore(name, state)
            for place in [place for place in missing if place[0] == name]:
                prefix = f"{place[1]}."
                if own := {key.removeprefix(prefix): each for key, each in state.items() if key.startswith(prefix)}:
                    missing.pop(place).restore(own, steps_taken=steps_taken, device=self._device)
        assert not missing, list(missing)

    def _restore(self, name: str, state: Moments) -> None:
        for key in self._optimizer.moments:
            self._set(self._parameters[name], key, self._expert_parallel.own(name, state[key]))
        for group in self._inner.param_groups:
            group.update({key: state[key].item() for key in self._optimizer.numbers})

    @torch.no_grad()
    def average(self) -> list[tuple[Tensor, Tensor]]:
        """Puts the averaged weights in place of those in training, of an optimizer that averages. A collective.

        Gives each tensor that it changed, and what it was, for `put_back`.
        """
        if not (self._optimizer.averages and any(self._inner.state.values())):
            return []
        self._link()
        changed = []
        for parameter in self._parameters.values():
            # y = (1 - b) z + b x: the weights in training, of the steps' sum z and the average x.
            z, values = self._moment(parameter, "z"), parameter.data
            if self._stage == 3:
                z, values = self._piece(parameter, z), parameter.ds_tensor
            changed.append((values, values.clone(), z))
        with self._weights_in_pieces():
            for values, _, z in changed:
                values.lerp_(z.view_as(values), 1 - 1 / self._config.betas[0])
        return [(values, before) for values, before, _ in changed]

    @torch.no_grad()
    def put_back(self, changed: list[tuple[Tensor, Tensor]]) -> None:
        """Undoes `average`, bit for bit."""
        with self._weights_in_pieces():
            for values, before in changed:
                values.copy_(before)

    @contextmanager
    def _weights_in_pieces(self) -> Iterator[None]:
        """In it, stage 3 has gathered no weight; those that it keeps gathered are gathered again afterwards."""
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
        yield
        if self._stage == 3:
            self._zero.checkpoint_event_epilogue()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self._inner.state[parameter][key].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        safe_set_local_optimizer_state(parameter, self._piece(parameter, value), key)

    def _piece(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's piece of `value`, as stage 3 cuts it: padded to equal pieces, one per rank."""
        piece = parameter.ds_tensor.numel()
        rank, ranks = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
        flat = F.pad(value.flatten(), (0, piece * ranks - value.numel()))
        return flat[rank * piece : (rank + 1) * piece]
