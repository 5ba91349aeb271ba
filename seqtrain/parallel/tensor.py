"""Tensor parallelism (Megatron, arXiv 1909.08053): heads, channels and the vocabulary divided over a group's ranks.

A layer is built at its local size. What enters it is the same on every rank (`enter`), what leaves is the sum of what
the ranks made (`leave`): one exchange forward, one backward. Between the two every gradient is a rank's part of a sum;
so weights there that all ranks hold whole (norms of heads, matrices of low rank) have theirs summed (`sum_gradients`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.kernels.linear_cross_entropy import IGNORED
from seqtrain.kernels.products import linear


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the `count` ranks of `group`, which divide every layer; one rank divides nothing.

    Without a group, as of a model that is only counted, nothing is sent, and results have their shapes alone.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    def enter(self, x: Tensor) -> Tensor:
        """`x`, the same on all ranks, into what each computes its part of: gradients are summed over the ranks."""
        return x if self.group is None else _Enter.apply(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """The sum of the ranks' `x`; what follows is computed by all alike."""
        return x if self.group is None else _Leave.apply(x, self.group)

    def total(self, x: Tensor) -> Tensor:
        """The sum of the ranks' `x`, of which each makes its own part of what follows."""
        return self.enter(self.leave(x))

    def join(self, x: Tensor, size: int = 0) -> Tensor:
        """The ranks' parts side by side in the last dimension, `size` in all; what follows is computed by all alike."""
        size = size or x.shape[-1] * self.count
        if self.count == 1:
            return x
        return x.new_empty(*x.shape[:-1], size) if self.group is None else _Join.apply(x, size, self)

    def own(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's part of `x` along `dim`."""
        if self.count == 1:
            return x
        begin, end = self.span(x.shape[dim])
        return x.narrow(dim, begin, end - begin)

    def span(self, size: int, rank: int | None = None) -> tuple[int, int]:
        """Where a rank's part of so many begins and ends: of this rank, or of another."""
        rank = self.rank if rank is None else rank
        return size * rank // self.count, size * (rank + 1) // self.count


ALONE = TensorParallel()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return _summed(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return grads[0], None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, place: TensorParallel) -> Tensor:
        ctx.place, spans = place, [place.span(size, rank) for rank in range(place.count)]
        # Equal pieces are sent, whatever a rank has.
        most = max(end - begin for begin, end in spans)
        padded = x.new_zeros(*x.shape[:-1], most)
        padded[..., : x.shape[-1]] = x
        parts = [torch.empty_like(padded) for _ in spans]
        dist.all_gather(parts, padded, group=place.group)
        return torch.cat([part[..., : end - begin] for part, (begin, end) in zip(parts, spans, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return ctx.place.own(grads[0]), None, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class RowLinear(nn.Linear):
    """An `nn.Linear` of which each rank has the columns for its part of the input: the result is the whole sum."""

    def __init__(self, inner: int, out: int, tensor: TensorParallel, *, bias: bool = False, parts: Sequence[int] = ()):
        """`parts`: neighboring columns that are divided apart from others; empty: all together."""
        super().__init__(inner, out, bias=bias)
        self.tensor, self.tensor_parts = tensor, {"weight": (1, parts)}

    def forward(self, x: Tensor) -> Tensor:
        if self.tensor.count == 1:
            return linear(x, self.weight, self.bias)
        out = self.tensor.leave(linear(x, self.weight))
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Division:
    """How ranks divide a weight: each of the `parts` that lie one after the other along `dim` evenly, in their order.

    So a rank's piece has its part of each, as of queries, keys and values in one matrix.
    """

    dim: int
    parts: tuple[int, ...]

    def places(self, rank: int, count: int) -> list[tuple[int, int]]:
        """Where along the whole's `dim` the piece of `rank` lies, from a place to a place for each part."""
        place, begin, found = TensorParallel(rank, count), 0, []
        for part in self.parts:
            first, last = place.span(part)
            found.append((begin + first, begin + last))
            begin += part
        return found

    def own(self, whole: Tensor, rank: int, count: int) -> Tensor:
        """The piece of `rank`."""
        pieces = [whole.narrow(self.dim, begin, end - begin) for begin, end in self.places(rank, count)]
        return torch.cat(pieces, self.dim)

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """The reverse: of the pieces of all ranks, in their order."""
        spread = []
        for rank, piece in enumerate(pieces):
            sizes = [end - begin for begin, end in self.places(rank, len(pieces))]
            spread.append(piece.split(sizes, self.dim))
        return torch.cat([part for parts in zip(*spread, strict=True) for part in parts], self.dim)


def divisions(local: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Division]:
    """The weights of `local` that are a rank's pieces of whole ones of these `shapes`, and how these are divided.

    A weight is divided along the dimension that is shorter. That consists of one part, or of those that `tensor_parts`
    of the module says, a dimension and sizes on this rank by the weight's name.
    """
    found = {}
    for path, module in local.named_modules():
        told: Mapping[str, tuple[int, Sequence[int]]] = vars(module).get("tensor_parts", {})
        for name, weight in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if full not in shapes or weight.shape == shapes[full]:
                continue
            sizes = shapes[full]
            [dim] = [dim for dim, size in enumerate(sizes) if size != weight.shape[dim]]
            of, parts = told.get(name, (dim, ()))
            times = sizes[dim] // weight.shape[dim] if of == dim and parts else 0
            found[full] = Division(dim, tuple(part * times for part in parts) if times else (sizes[dim],))
            assert sum(found[full].parts) == sizes[dim], (full, found[full], sizes)
    return found


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Has the gradient of each, in every backward pass, summed over the ranks of `group`."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: _summed(gradient, group))


def softmax_of_parts(
    logits: Tensor, labels: Tensor, need_gradient: bool, *, first: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of logits of which this rank has `[n,part]`, from id `first` on; may spoil them.

    `labels`: int64 `[n]`, of the whole vocabulary, or -100. Returns the losses `[n]`, float32 at least, and the
    gradient of this rank's logits in their dtype. Sends three numbers a row.
    """
    product, inside = logits.dtype, (labels >= first) & (labels < first + logits.shape[1])
    label, counted = (labels - first).where(inside, 0)[:, None], (labels != IGNORED)[:, None]
    logits = logits.to(torch.promote_types(torch.float32, product))
    top = logits.amax(1, keepdim=True)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    logits -= top
    chosen = logits.gather(1, label) * inside[:, None]
    logits.exp_()
    sums = torch.cat([logits.sum(1, keepdim=True), chosen], 1)
    dist.all_reduce(sums, group=group)
    total, chosen = sums.split(1, 1)
    losses = ((total.log() - chosen) * counted)[:, 0]
    if not need_gradient:
        return losses, None
    return losses, logits.mul_(counted / total).scatter_add_(1, label, -inside[:, None].to(logits.dtype)).to(product)
