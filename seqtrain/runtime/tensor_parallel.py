"""Layers divided over tensor-parallel ranks, as DeepSpeed is told of them: whose gradients are averaged with whose."""

from dataclasses import dataclass, replace

import torch.distributed as dist

from seqtrain.models import LanguageModel
from seqtrain.models.divided import Divided, divide
from seqtrain.parallel.mesh import Mesh
from seqtrain.parallel.tensor import sum_gradients
from seqtrain.runtime.task import Trainable


@dataclass(frozen=True)
class ModelParallelUnit:
    """What DeepSpeed asks about ranks that have other parts of a model, in Megatron's names (`mpu`).

    `replicas`: those with the same parts as this one, among which ZeRO divides; `group`: those with the others.
    """

    replicas: dist.ProcessGroup
    group: dist.ProcessGroup

    @classmethod
    def of(cls, mesh: Mesh) -> "ModelParallelUnit":
        assert mesh.replicas is not None
        assert mesh.tensor.group is not None
        return cls(mesh.replicas, mesh.tensor.group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.replicas

    def get_data_parallel_world_size(self) -> int:
        return self.replicas.size()

    def get_data_parallel_rank(self) -> int:
        return self.replicas.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_model_parallel_world_size(self) -> int:
        return self.group.size()

    def get_model_parallel_rank(self) -> int:
        return self.group.rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def divided_trainable(trainable: Trainable, mesh: Mesh) -> tuple[Trainable, Divided]:
    """`trainable` with this rank's part of its model, and how it is divided. Raises `ConfigError`."""
    whole = trainable.model
    assert isinstance(whole, LanguageModel), type(whole)
    divided = divide(whole, mesh.tensor)
    own, names = dict(divided.model.named_parameters()), {p: name for name, p in whole.named_parameters()}
    groups = [{**group, "params": [own[names[p]] for p in group["params"]]} for group in trainable.groups]
    return replace(trainable, model=divided.model, groups=groups), divided


def mark_parts(divided: Divided) -> None:
    """Tells DeepSpeed and the optimizer which weights are parts, and has gradients summed that are parts of a sum.

    After the weights have their numbers.
    """
    named, group = dict(divided.model.named_parameters()), divided.tensor.group
    assert group is not None
    for name in divided.divisions:
        named[name].model_parallel = True  # type: ignore[attr-defined]
    sum_gradients(divided.shared, group)
