"""An optimizer's moments by the name of the weight they belong to, whatever ZeRO stage and rank count hold them.

DeepSpeed's own checkpoints have one pickle per rank and stage. Stretches of named tensors can be saved as safetensors
and read back on another number of ranks or in another stage.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.runtime.expert_parallel import ExpertParallel
from seqtrain.runtime.matrix_rules import MatrixOptimizer
from seqtrain.runtime.optimizers import OPTIMIZERS, OptimizerConfig, StepOfSome
from seqtrain.runtime.restoring import Restoration
from seqtrain.runtime.whole_matrices import HeldBlocks, WholeMatrices
from seqtrain.runtime.zero import Replicas

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

    def local(self, name: str) -> Moments:
        """The moments of a weight that this rank holds, flat, of the numbers it holds of the weight; none of a matrix.

        After `link`.
        """
        if name not in self._parameters:
            return {}
        return {key: self._moment(self._parameters[name], key) for key in self._optimizer.moments}

    def averaged(self, weight: Tensor, moments: Moments) -> Tensor | None:
        """Of some numbers of a weight in training their averages; None where the optimizer has none."""
        if not (self._optimizer.averages and moments):
            return None
        # y = (1 - b) z + b x: the weights in training, of the steps' sum z and the average x.
        return weight.lerp(moments["z"], 1 - 1 / self._config.betas[0])

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """As `NAME:NUMBER.KEY`, what this rank saves of weights that consist of matrices: each has a state of its own.

        A step must have been taken.
        """
        for held in () if self._repeats else self._held.values():
            for block, optimizer in held.owned:
                for key, value in optimizer.state().items():
                    yield f"{block.weight}:{block.number}.{key}", value

    def numbers(self) -> dict[str, float]:
        """What else of it follows from the steps before, alike for all weights. A step must have been taken."""
        return {key: float(self._inner.param_groups[0][key]) for key in self._optimizer.numbers}

    def _moment(self, parameter: Any, key: str) -> Tensor:
        """What this rank holds of it, flat."""
        if self._stage == 0:
            return self._inner.state[parameter][key].view(-1)
        if self._stage < 3:
            return parameter._hp_mapping.get_optim_state_fragment(key)
        from deepspeed.utils import safe_get_local_optimizer_state

        return safe_get_local_optimizer_state(parameter, key).view(-1)

    def link(self) -> None:
        """Lets ZeRO 1 and 2 find the moments of every weight; before they are read or set.

        DeepSpeed does this by itself once, when the first parameter group has been stepped for the first time; the
        groups after it have no moments yet then, and stay unlinked.
        """
        if self._stage in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def restore(self, restoration: Restoration, *, steps_taken: int) -> None:
        """Gives the optimizer the state of a checkpoint, and its count of steps. A collective."""
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
        numbers = {key: restoration.numbers.get(key, 0.0) for key in self._optimizer.numbers}
        for group in self._inner.param_groups:
            group |= numbers
            if isinstance(self._inner, StepOfSome):
                group["step"] = steps_taken
        self.link()
        for name, parameter in self._parameters.items():
            for key in self._optimizer.moments:
                self._restore(restoration, name, parameter, key)
        for tensors in self._held.values():
            self._restore_matrices(restoration, tensors, steps_taken)

    def _restore(self, restoration: Restoration, name: str, parameter: Any, key: str) -> None:
        if self._stage == 3:
            begin, end = own_piece(parameter)
            self._moment(parameter, key)[: end - begin] = restoration.own(name, key, begin, end)
            return
        mapping = vars(parameter)["_hp_mapping"] if self._stage else None
        part = self._expert_parallel.is_part(name)
        if self._stage and not part:
            if mapping is not None:
                begin, numbers = own_fragment(mapping)
                self._moment(parameter, key).copy_(restoration.own(name, key, begin, begin + numbers))
            return
        # All ranks need it, or parts of it that are no stretches.
        whole = restoration.whole(name, key, self._expert_parallel.whole_shape(name, parameter.shape))
        value = self._expert_parallel.own(name, whole).flatten()
        if self._stage == 0:
            self._moment(parameter, key).copy_(value)
        elif mapping is not None:
            self._moment(parameter, key).copy_(value.narrow(0, *own_fragment(mapping)))

    def _restore_matrices(self, restoration: Restoration, held: HeldBlocks, steps_taken: int) -> None:
        updated: dict[str, dict[int, MatrixOptimizer]] = {block.weight: {} for block in held.blocks}
        for block, optimizer in held.updated:
            updated[block.weight][block.number] = optimizer
        for name, optimizers in updated.items():
            # Every rank of one that is not divided has all of the weight's matrices, or those of its experts.
            shared = not (held.divided or self._expert_parallel.is_part(name))
            states = restoration.states(name, list(optimizers), shared=shared)
            for number, state in states.items():
                optimizers[number].restore(state, steps_taken=steps_taken, device=self._device)

    @torch.no_grad()
    def average(self) -> list[tuple[Tensor, Tensor]]:
        """Puts the averaged weights in place of those in training, of an optimizer that averages. A collective.

        Gives each tensor that it changed, and what it was, for `put_back`.
        """
        if not (self._optimizer.averages and any(self._inner.state.values())):
            return []
        self.link()
        changed = []
        for parameter in self._parameters.values():
            # y = (1 - b) z + b x: the weights in training, of the steps' sum z and the average x.
            values = parameter.ds_tensor if self._stage == 3 else parameter.data
            changed.append((values, values.clone(), self._z(parameter)))
        with self.in_pieces():
            for values, _, z in changed:
                values.lerp_(z.view_as(values), 1 - 1 / self._config.betas[0])
        return [(values, before) for values, before, _ in changed]

    def _z(self, parameter: nn.Parameter) -> Tensor:
        """Of as much of a weight as each rank computes with. A collective in stages 1 and 2."""
        if self._stage not in (1, 2):
            return self._moment(parameter, "z")
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, "z")

    @torch.no_grad()
    def put_back(self, changed: list[tuple[Tensor, Tensor]]) -> None:
        """Undoes `average`, bit for bit."""
        with self.in_pieces():
            for values, before in changed:
                values.copy_(before)

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        """In it, stage 3 has gathered no weight; those that it keeps gathered are gathered again afterwards."""
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
        yield
        if self._stage == 3:
            self._zero.checkpoint_event_epilogue()


def own_piece(parameter: Any) -> tuple[int, int]:
    """From which number to which this rank's piece of a flattened weight is, as stage 3 cuts it evenly; not padded."""
    piece, numbers, rank = parameter.ds_tensor.numel(), parameter.ds_numel, parameter.ds_zero_partition_rank
    return min(rank * piece, numbers), min((rank + 1) * piece, numbers)


def own_fragment(mapping: Any) -> tuple[int, int]:
    """Where the numbers of ZeRO 1 or 2 that this rank holds of a weight begin in it, flattened, and how many."""
    return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
