"""Experts sharded over ranks, as DeepSpeed is told of them: whose gradients are averaged with whose."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.data.batches import even_offsets
from seqtrain.errors import ConfigError
from seqtrain.models.divided import Divided
from seqtrain.models.feed_forward import MoE
from seqtrain.parallel.experts import local_experts
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.slices import Cut


class ExpertParallel:
    """Which parameters of a model are parts: each rank of `group` has its experts. None: all are whole.

    `divided`: parts of layers that tensor-parallel ranks have, whatever their experts.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, divided: Divided | None = None):
        self.group, self._divided = group, divided
        self._parts: set[nn.Parameter] = set()
        if group is not None:
            layers = [module for module in model.modules() if isinstance(module, MoE)]
            self._parts.update(weight for layer in layers for weight in layer.shard_experts(group))
            # What DeepSpeed calls the groups of so many neighbors.
            self._name = f"ep_size_{group.size()}"
            for part in self._parts:
                part.allreduce, part.group_name = False, self._name  # type: ignore[attr-defined]
        self._names = {name for name, parameter in model.named_parameters() if parameter in self._parts}

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's, parts in groups of their own: ZeRO divides them over the ranks that have the same ones."""
        if self.group is None:
            return groups
        whole = [{**each, "params": [p for p in each["params"] if p not in self._parts]} for each in groups]
        marks = {"moe": True, "name": self._name}
        parts = [{**each, **marks, "params": [p for p in each["params"] if p in self._parts]} for each in groups]
        if not any(each["params"] for each in parts):
            raise ConfigError(f"parallel.experts={self.group.size()}: no routed experts are trained; use 1")
        return [each for each in (*whole, *parts) if each["params"]]

    @contextmanager
    def announced(self, model: nn.Module) -> Iterator[None]:
        """While DeepSpeed makes its engine of `model`: it looks for a layer of its own, which forms groups.

        Theirs are over the same neighbors; gradients of parts are summed over the others, and divided by all ranks.
        """
        if self.group is None:
            yield
            return
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        ranks = self.group.size()
        _forget_groups(self._name)
        # It prints what it forms.
        with redirect_stdout(io.StringIO()):
            sizes = {"num_experts": ranks, "ep_size": ranks}
            model.marker = DeepSpeedMoE(
                1, nn.Identity(), **sizes, enable_expert_tensor_parallelism=self._divided is not None
            )
            try:
                yield
            finally:
                del model.marker

    def share(self, name: str, numbers: int, ranks: Ranks) -> slice:
        """Which of the parameter's `numbers` are this rank's, where those who have the same ones divide them."""
        others = self.group.size() if self.group is not None and name in self._names else 1
        offsets = even_offsets(numbers, ranks.count // others)
        return slice(*offsets[ranks.rank // others :][:2])

    def is_part(self, name: str) -> bool:
        """Whether this rank has a part of the parameter `name`, by its experts or by its part of the layer."""
        return (self.group is not None and name in self._names) or (
            self._divided is not None and name in self._divided.divisions
        )

    def cuts(self, name: str, shape: torch.Size) -> list[Cut]:
        """Where this rank's part of a parameter, of `shape`, lies in the whole; empty where it has the whole."""
        found: list[Cut] = []
        if self.group is not None and name in self._names:
            first = self.group.rank() * shape[0]
            found.append((0, [(first, first + shape[0])]))
        if self._divided is not None and name in self._divided.divisions:
            division, tensor = self._divided.divisions[name], self._divided.tensor
            places = [(begin, end) for begin, end in division.places(tensor.rank, tensor.count) if begin < end]
            found.append((division.dim, places))
        return found

    def whole_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """Of the parameter `name`, of which this rank's part has `shape`."""
        if self._divided is not None:
            shape = self._divided.whole_shape(name, shape)
        if self.group is None or name not in self._names:
            return shape
        return torch.Size((shape[0] * self.group.size(), *shape[1:]))

    def own(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of the whole parameter `name`, or of anything of its shape."""
        value = value if self._divided is None else self._divided.own(name, value)
        return local_experts(value, self.group) if self.group is not None and name in self._names else value


def _forget_groups(name: str) -> None:
    """Has DeepSpeed form the groups of this name anew: a process may have been another mesh's before."""
    from deepspeed.utils import groups

    for known in (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict()):
        known.pop(name, None)
