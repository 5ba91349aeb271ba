"""An optimizer of whole matrices under every ZeRO stage: each matrix is updated by one rank, its owner, and never cut.

ZeRO cuts what it divides into flat stretches, a matrix too. Here the owner is sent the gradient of the whole matrix,
makes the update, and sends each rank its stretch of the change. The state of a matrix is its owner's alone, so that it
is divided as ZeRO 1 divides AdamW's. In stage 0 nothing is divided: every rank updates all.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    `span(rank, index)`: what a rank of `group` has of a block; None where every rank has all.
    """

    def __init__(
        self,
        blocks: list[Block],
        span: Callable[[int, int], Span] | None,
        group: dist.ProcessGroup,
        config: OptimizerConfig,
    ):
        self.blocks, self.divided, self.group = blocks, span is not None, group
        rank, ranks = group.rank(), group.size()
        owners = deal([block.cost for block in blocks], ranks)
        rule = RULES[config.name]
        self._owned = [index for index, owner in enumerate(owners) if owner == rank]
        self.optimizers = {
            index: MatrixOptimizer(ADAMW if block.gate else rule, block.rows, block.columns, config)
            for index, block in enumerate(blocks)
            if not self.divided or owners[index] == rank
        }
        if span is None:
            return
        # This rank's, in the order of owners; those of this rank's blocks, in the order of ranks.
        dealt = sorted(range(len(blocks)), key=lambda index: owners[index])
        self._own = [span(rank, index) for index in dealt]
        self._of_owned = [(index, span(other, index)) for other in range(ranks) for index in self._owned]
        # How many numbers go to each owner, and come from each rank.
        self._to, self._come = [0] * ranks, [0] * ranks
        for index, part in zip(dealt, self._own, strict=True):
            self._to[owners[index]] += part.numbers
        for number, (_, part) in enumerate(self._of_owned):
            self._come[number // len(self._owned)] += part.numbers

    @property
    def owned(self) -> Iterator[tuple[Block, MatrixOptimizer]]:
        """The blocks whose state this rank saves."""
        yield from ((self.blocks[index], self.optimizers[index]) for index in self._owned)

    @property
    def updated(self) -> Iterator[tuple[Block, MatrixOptimizer]]:
        """The blocks that this rank updates."""
        yield from ((self.blocks[index], optimizer) for index, optimizer in self.optimizers.items())

    def update(self, tensor: Tensor, *, rate: float, decay: float) -> None:
        """A step of the blocks in `tensor`, which has a gradient. All ranks of the group call it."""
        gradient = tensor.grad.flatten()  # type: ignore[union-attr]
        wholes = self._gathered(gradient) if self.divided else self._inside(gradient)
        changes = {
            index: optimizer.change(wholes[index].view(optimizer.shape), rate).flatten()
            for index, optimizer in self.optimizers.items()
        }
        tensor.mul_(1 - rate * decay)
        flat = tensor.view(-1)
        if self.divided:
            for span, change in self._scattered(changes, gradient):
                flat[span.at : span.at + span.numbers] += change
            return
        for index, place in self._inside(flat).items():
            place += changes[index]

    def _inside(self, flat: Tensor) -> dict[int, Tensor]:
        """The blocks of a flattened weight that is whole."""
        return {index: flat[block.start : block.start + block.numbers] for index, block in enumerate(self.blocks)}

    def _gathered(self, gradient: Tensor) -> dict[int, Tensor]:
        """The whole, flattened gradients of the blocks that this rank owns, from each rank's stretches."""
        leaving = torch.cat([gradient[span.at : span.at + span.numbers] for span in self._own])
        come = self._exchange(leaving, self._to, self._come)
        whole = {index: gradient.new_empty(self.blocks[index].numbers) for index in self._owned}
        parts = come.split([span.numbers for _, span in self._of_owned])
        for (index, span), part in zip(self._of_owned, parts, strict=True):
            whole[index][span.begin : span.end] = part
        return whole

    def _scattered(self, changes: Mapping[int, Tensor], like: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """This rank's stretches of the changes that owners have made."""
        # A rank may own none.
        leaving = [like[:0], *(changes[index][span.begin : span.end] for index, span in self._of_owned)]
        come = self._exchange(torch.cat(leaving), self._come, self._to)
        yield from zip(self._own, come.split([span.numbers for span in self._own]), strict=True)

    def _exchange(self, leaving: Tensor, to: list[int], come: list[int]) -> Tensor:
        arrived = leaving.new_empty(sum(come))
        dist.all_to_all_single(arrived, leaving, come, to, group=self.group)
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
        stretch = None
        if stage == 3:
            stretch = _cut_one_by_one(weights)
        elif stage:
            stretch = _cut_in_a_row(weights, zero.round_robin_bit16_offsets[number], tensor.numel())
        held[tensor] = HeldBlocks(blocks, stretch and _spans(blocks, weights, matrices, stretch), group, config)
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


# A rank, and which weight -> its stretch of the flattened weight.
Stretch = Callable[[int, int], Span]


def _spans(blocks: list[Block], weights: list[nn.Parameter], matrices: Blocks, stretch: Stretch) -> Stretch:
    """By rank and block what `stretch` says by rank and weight."""
    inside = [number for number, weight in enumerate(weights) for _ in matrices[weight]]
    return lambda rank, index: _part(stretch(rank, inside[index]), blocks[index])


def _cut_in_a_row(weights: list[nn.Parameter], offsets: list[int], size: int) -> Stretch:
    """ZeRO 1 and 2: weights lie in one row, of which each rank has the next `size` numbers."""
    numbers = [weight.numel() for weight in weights]

    def stretch(rank: int, weight: int) -> Span:
        first = rank * size - offsets[weight]
        begin, end = (min(max(place, 0), numbers[weight]) for place in (first, first + size))
        return Span(begin, end, max(-first, 0))

    return stretch


def _cut_one_by_one(weights: list[Any]) -> Stretch:
    """ZeRO 3: each weight is cut evenly, and a rank's pieces lie in a row."""
    pieces, numbers = [weight.ds_tensor.ds_numel for weight in weights], [weight.ds_numel for weight in weights]
    places = list(accumulate(pieces, initial=0))

    def stretch(rank: int, weight: int) -> Span:
        begin, end = (min(place * pieces[weight], numbers[weight]) for place in (rank, rank + 1))
        return Span(begin, end, places[weight])

    return stretch


def _part(stretch: Span, block: Block) -> Span:
    """What of a stretch of a weight belongs to `block`."""
    begin = min(max(stretch.begin, block.start), stretch.end)
    end = max(min(stretch.end, block.start + block.numbers), begin)
    return Span(begin - block.start, end - block.start, stretch.at + begin - stretch.begin)
