"""What ZeRO is told besides its stage: shards of so many ranks and their replicas, and what travels in bfloat16."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.data.batches import even_offsets
from seqtrain.models.matrices import matrices_of
from seqtrain.parallel.mesh import Shards

# Numbers that are summed over the replicas at once.
BUCKET = 1 << 27
# Numbers that stage 3 reduces at once: half a rank's share of the model, within these.
LEAST_BUCKET, LARGEST_BUCKET = 1 << 20, 500_000_000
# The part of a model (1 / it) that stage 3 may hold gathered.
STAGE_3_PART = 8


class Replicas:
    """What DeepSpeed calls a model parallel unit: its data parallel group is the shard, and no model is divided.

    DeepSpeed averages gradients within a shard; `average` does so over the replicas, before a step.
    """

    def __init__(self, shards: Shards):
        self._shards = shards

    @property
    def first(self) -> bool:
        """Whether this rank's parts are those that count, in sums over all ranks and as states of whole matrices."""
        return self._shards.replicas.rank() == 0

    def share(self, numbers: int) -> slice:
        """Which of so many numbers, that the replicas hold too, this rank writes."""
        offsets = even_offsets(numbers, self._shards.replicas.size())
        return slice(*offsets[self._shards.replicas.rank() :][:2])

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


def stage_3_sizes(model: nn.Module, shards: int, *, one_group: bool) -> dict[str, int]:
    """What ZeRO 3 may hold besides a rank's share, in numbers: a part of the model, or its largest weight.

    DeepSpeed's own sizes are for models that are far larger: with them, one of less than 10^9 weights is whole on every
    rank from its first pass on, and its gradients, too. `one_group`: of an optimizer that must see all at once.
    """
    counts = [weight.numel() for weight in model.parameters()]
    part = max([*counts, sum(counts) // STAGE_3_PART])
    return {
        "reduce_bucket_size": min(max(sum(counts) // (2 * shards), LEAST_BUCKET), part, LARGEST_BUCKET),
        "stage3_prefetch_bucket_size": min(part // 2, 50_000_000),
        "stage3_max_live_parameters": min(part, 10**9),
        "stage3_max_reuse_distance": min(part, 10**9),
        "sub_group_size": 10**15 if one_group else min(max(1, part // shards), 10**9),
    }


def share_weights(zero: Any) -> None:
    """Lets stage 3's optimizer change the very weights that are gathered, where both are of one dtype: not a copy."""
    for master, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        if master.dtype == weights.dtype:
            master.data = weights
