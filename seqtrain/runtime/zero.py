"""What ZeRO is told besides its stage: shards of so many ranks and their replicas, and what travels in bfloat16."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.models.matrices import matrices_of
from seqtrain.parallel.mesh import Shards

# Numbers that are summed over the replicas at once.
BUCKET = 1 << 27


class Replicas:
    """What DeepSpeed calls a model parallel unit: its data parallel group is the shard, and no model is divided.

    DeepSpeed averages gradients within a shard; `average` does so over the replicas, before a step.
    """

    def __init__(self, shards: Shards):
        self._shards = shards

    @property
    def first(self) -> bool:
        """Whether this rank's parts are those that count, in sums over all ranks and in checkpoints."""
        return self._shards.replicas.rank() == 0

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._shards.group

    def get_data_parallel_world_size(self) -> int:
        return self._shards.group.size()

    def get_data_parallel_rank(self) -> int:
        return self._shards.group.rank()

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    @torch.no_grad()
    def average(self, zero: Any) -> None:
        """Averages the gradients that `zero`, DeepSpeed's optimizer, has reduced in this shard. A collective."""
        for gradients in _buckets([each for of_group in zero.averaged_gradients.values() for each in of_group]):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self._shards.replicas)
            flat /= self._shards.replicas.size()
            for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in lists of one dtype, each of BUCKET numbers or little more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(each.numel() for each in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def send_matrices_in_bfloat16(model: nn.Module) -> None:
    """Before ZeRO is made: it sends gradients of matrices, and in stage 3 them, as bfloat16; what is summed is rounded.

    Gates, embeddings, the head and vectors stay as they are. DeepSpeed looks for it where products are bfloat16.
    """
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    for weight, blocks in matrices_of(model).items():
        if not any(block.gate for block in blocks):
            setattr(weight, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)
