"""An optimizer of whole matrices under every ZeRO stage: each matrix is updated by one rank, its owner, and never cut.

ZeRO cuts what it divides into flat stretches, a matrix too. Here the owner is sent the gradient of the whole matrix,
makes the update, and sends each rank its stretch of the change. The state of a matrix is its owner's alone, so that it
is divided as ZeRO 1 divides AdamW's. In stage 0 nothing is divided: every rank updates all.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.models.matrices import Block
from seqtrain.runtime.matrix_rules import ADAMW, RULES, MatrixOptimizer
from seqtrain.runtime.optimizers import OptimizerConfig

# The key that marks the groups of matrices.
MATRICES = "matrices"
Blocks = Mapping[nn.Parameter, list[Block]]


class WholeMatrices(torch.optim.AdamW):
    """The rule called `config.name` for the groups marked as matrices, AdamW for the others.

    `held`: what is needed to update each tensor of those groups; by `place_blocks`, once ZeRO has made its tensors.
    """

    held: Mapping[Tensor, "HeldBlocks"] = MappingProxyType({})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if MATRICES not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            for tensor in group["params"] if MATRICES in group else ():
                if tensor.grad is not None:
                    self.held[tensor].update(tensor, rate=group["lr"], decay=group["weight_decay"])


def split_groups(groups: Sequence[dict[str, Any]], matrices: Collection[nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's groups with `matrices` in groups of their own, marked as such."""
    inside = [[p in matrices for p in group["params"]] for group in groups]
    split = [
        {**group, "params": [p for p, here in zip(group["params"], places, strict=True) if here == marked]}
        | ({MATRICES: True} if marked else {})
        for group, places in zip(groups, inside, strict=True)
        for marked in (False, True)
    ]
    return [group for group in split if group["params"]]


@dataclass(frozen=True)
class Span:
    """A rank's stretch of a flattened block: `begin` to `end` of it are at `at` in the tensor that the rank holds."""

    begin: int
    end: int
    at: int

    @property
    def numbers(self) -> int:
        return self.end - self.begin


class HeldBlocks:
    """The blocks in one tensor of the optimizer: a weight, or a rank's stretch of several.

    `spans`: by rank of `group`, that of each block; None where every rank of it holds all.
    """

    def __init__(
        self, blocks: list[Block], spans: list[list[Span]] | None, group: dist.ProcessGroup, config: OptimizerConfig
    ):
        self.blocks, self.spans, self.group = blocks, spans, group
        self.rank, self.ranks = group.rank(), group.size()
        self.owners = deal([block.cost for block in blocks], self.ranks)
        rule = RULES[config.name]
        self.optimizers = {
            index: MatrixOptimizer(ADAMW if block.gate else rule, block.rows, block.columns, config)
            for index, block in enumerate(blocks)
            if spans is None or self.owners[index] == self.rank
        }

    @property
    def owned(self) -> Iterator[tuple[Block, MatrixOptimizer]]:
        """The blocks whose state this rank saves."""
        for index, optimizer in self.optimizers.items():
            if self.owners[index] == self.rank:
                yield self.blocks[index], optimizer

    @property
    def updated(self) -> Iterator[tuple[Block, MatrixOptimizer]]:
        """The blocks that this rank updates."""
        yield from ((self.blocks[index], optimizer) for index, optimizer in self.optimizers.items())

    def update(self, tensor: Tensor, *, rate: float, decay: float) -> None:
        """A step of the blocks in `tensor`, which has a gradient. All ranks of the group call it."""
        gradients = self._whole_gradients(tensor.grad.flatten())  # type: ignore[union-attr]
        changes = {
            index: optimizer.change(gradients[index].view(optimizer.shape), rate).flatten()
            for index, optimizer in self.optimizers.items()
        }
        tensor.mul_(1 - rate * decay)
        flat = tensor.view(-1)
        for span, change in self._own_changes(changes):
            flat[span.at : span.at + span.numbers] += change

    def _whole_gradients(self, gradient: Tensor) -> dict[int, Tensor]:
        """The flattened gradients of the blocks that this rank updates."""
        if self.spans is None:
            return {index: gradient[self._inside[index]] for index in self.optimizers}
        own = self.spans[self.rank]
        leaving = [
            gradient[own[index].at : own[index].at + own[index].numbers]
            for rank in range(self.ranks)
            for index in self._owned_by(rank)
        ]
        come = self._exchange(leaving, to_owners=True)
        whole = {index: gradient.new_empty(self.blocks[index].numbers) for index in self.optimizers}
        mine = [self.spans[rank][index] for rank in range(self.ranks) for index in self.optimizers]
        places = [index for _ in range(self.ranks) for index in self.optimizers]
        for index, span, part in zip(places, mine, come.split([span.numbers for span in mine]), strict=True):
            whole[index][span.begin : span.end] = part
        return whole

    def _own_changes(self, changes: Mapping[int, Tensor]) -> Iterator[tuple[Span, Tensor]]:
        """What each rank adds to its stretches, from the flattened changes of the blocks that this rank updates."""
        if self.spans is None:
            for index, change in changes.items():
                inside = self._inside[index]
                yield Span(0, len(change), inside.start), change
            return
        leaving = [
            change[self.spans[rank][index].begin : self.spans[rank][index].end]
            for rank in range(self.ranks)
            for index, change in changes.items()
        ]
        come = self._exchange(leaving, to_owners=False)
        mine = [self.spans[self.rank][index] for rank in range(self.ranks) for index in self._owned_by(rank)]
        yield from zip(mine, come.split([span.numbers for span in mine]), strict=True)

    @cached_property
    def _inside(self) -> list[slice]:
        """Where each block is in a tensor that holds all."""
        return [slice(block.start, block.start + block.numbers) for block in self.blocks]

    def _owned_by(self, rank: int) -> list[int]:
        return [index for index, owner in enumerate(self.owners) if owner == rank]

    def _exchange(self, leaving: list[Tensor], *, to_owners: bool) -> Tensor:
        """Sends a stretch of each block to its owner, or from it; `leaving`: by the rank they go to."""
        assert self.spans is not None
        # Numbers between this rank as holder of stretches and each rank as owner; and the other way.
        holding = [sum(self.spans[self.rank][index].numbers for index in self._owned_by(r)) for r in range(self.ranks)]
        owning = [sum(self.spans[r][index].numbers for index in self.optimizers) for r in range(self.ranks)]
        send, receive = (holding, owning) if to_owners else (owning, holding)
        flat = torch.cat(leaving)
        arrived = flat.new_empty(sum(receive))
        dist.all_to_all_single(arrived, flat, receive, send, group=self.group)
        return arrived


def deal(costs: Sequence[int], ranks: int) -> list[int]:
    """An owner for each block, so that the ranks have about as much to do: the dearest first, to who has least."""
    load, owners = [0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = owner = load.index(min(load))
        load[owner] += costs[index]
    return owners


def place_blocks(zero: Any, stage: int, matrices: Blocks, config: OptimizerConfig) -> None:
    """Tells the `WholeMatrices` that DeepSpeed runs where the blocks are; `zero`: DeepSpeed's optimizer."""
    inner = zero.optimizer if stage else zero
    held = {}
    for number, tensor, weights, group in _tensors_of_matrices(zero, stage, inner):
        blocks = [block for weight in weights for block in matrices[weight]]
        spans = None
        if stage:
            ranks = group.size()
            if stage == 3:
                stretches = _stretches_in_3(weights, ranks)
            else:
                stretches = _stretches_in_1(weights, zero.round_robin_bit16_offsets[number], tensor.numel(), ranks)
            spans = [
                [
                    _part(stretch, block)
                    for weight, stretch in zip(weights, own, strict=True)
                    for block in matrices[weight]
                ]
                for own in stretches
            ]
        held[tensor] = HeldBlocks(blocks, spans, group, config)
    inner.held = held


def _tensors_of_matrices(
    zero: Any, stage: int, inner: torch.optim.Optimizer
) -> Iterator[tuple[int, Tensor, list[nn.Parameter], dist.ProcessGroup]]:
    """The tensors of matrices: number in ZeRO, the tensor, weights inside, ranks among which they are cut."""
    groups = inner.param_groups
    if stage == 3:
        for number, weights in enumerate(zero.fp16_groups):
            if MATRICES in groups[zero.sub_group_to_group_id[number]]:
                group = zero.sub_group_process_groups[number]
                yield number, zero.fp32_partitioned_groups_flat[number], weights, group
        return
    for number, settings in enumerate(groups):
        if MATRICES not in settings:
            continue
        if stage:
            weights, group = zero.round_robin_bit16_groups[number], zero.real_dp_process_group[number]
            yield number, zero.single_partition_of_fp32_groups[number], weights, group
            continue
        world = dist.group.WORLD
        assert world is not None
        for weight in settings["params"]:
            yield number, weight, [weight], _same_experts(settings["name"]) if "moe" in settings else world


def _same_experts(name: str) -> dist.ProcessGroup:
    """The ranks that have the experts of this one."""
    from deepspeed.utils import groups

    found: dist.ProcessGroup = groups._get_expert_data_parallel_group(name)
    return found


def _stretches_in_1(weights: list[nn.Parameter], offsets: list[int], size: int, ranks: int) -> list[list[Span]]:
    """By rank, its stretch of each flattened weight in ZeRO 1 and 2: they lie in one row, which is cut evenly."""

    def within(place: int, weight: nn.Parameter) -> int:
        return min(max(place, 0), weight.numel())

    return [
        [
            Span(within(low - offset, weight), within(low + size - offset, weight), max(offset - low, 0))
            for weight, offset in zip(weights, offsets, strict=True)
        ]
        for low in range(0, size * ranks, size)
    ]


def _stretches_in_3(weights: list[nn.Parameter], ranks: int) -> list[list[Span]]:
    """By rank, its stretch of each flattened weight in ZeRO 3: each is cut evenly, and the pieces lie in a row."""
    cut: list[Any] = list(weights)
    pieces, sizes = [weight.ds_tensor.ds_numel for weight in cut], [weight.ds_numel for weight in cut]
    places = list(accumulate(pieces, initial=0))
    return [
        [
            Span(min(rank * piece, size), min((rank + 1) * piece, size), place)
            for piece, size, place in zip(pieces, sizes, places, strict=False)
        ]
        for rank in range(ranks)
    ]


def _part(stretch: Span, block: Block) -> Span:
    """What of a stretch of a weight belongs to `block`."""
    begin = min(max(stretch.begin, block.start), stretch.end)
    end = max(min(stretch.end, block.start + block.numbers), begin)
    return Span(begin - block.start, end - block.start, stretch.at + begin - stretch.begin)
