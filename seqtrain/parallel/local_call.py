"""One operator called on one rank's part of a sequence, and the parts of that part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.operator import Operator


@dataclass(frozen=True)
class Pieces:
    """A rank's `tokens`: the first `head` continue what came before, the others (the tail) start documents.

    `tail`: int64 `[N+1]`, boundaries of the N documents that start here, from 0, counted from the head's end; None
    where none does, and where B rows of one document each start here.
    """

    tokens: int
    head: int
    tail: Tensor | None

    @classmethod
    def of(cls, boundaries: Sequence[int] | None, start: int, end: int, *, continues: bool) -> "Pieces":
        """Those of tokens `start` to `end` of a row; `continues`: its first token has a past.

        `boundaries`: of the row's documents, rising from 0 to its length; None for B rows of one document each.
        """
        if boundaries is None:
            return cls(end - start, 0 if start == 0 and not continues else end - start, None)
        inner = [boundary for boundary in boundaries if start <= boundary < end]
        if inner and inner[0] == 0 and continues:
            del inner[0]
        if not inner:
            return cls(end - start, end - start, None)
        tail = torch.tensor([*inner, end], dtype=torch.int64) - inner[0]
        return cls(end - start, inner[0] - start, tail)


@dataclass(frozen=True)
class LocalCall:
    """`operator(*tensors, **options)` on a rank's tokens `[B,T_r,...]`, and where these stand in the row."""

    operator: Operator
    tensors: tuple[Any, ...]
    options: Mapping[str, Any]
    backend: str
    pieces: Pieces
    group: dist.ProcessGroup
    # Whether the row has documents: then a rank's map may be zero, whatever the operator's own maps are.
    packed: bool

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def head(self) -> "LocalCall":
        """The call on the tokens that continue what came before."""
        return self._slice(slice(0, self.pieces.head))

    def tail(self) -> "LocalCall":
        """The call on the documents that start here."""
        return self._slice(slice(self.pieces.head, self.pieces.tokens))

    def nothing(self) -> "LocalCall":
        """The call on no tokens."""
        return self._slice(slice(0, 0))

    def run(self, initial_state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """The operator itself, on these tokens alone."""
        return self.operator(
            *self.tensors, initial_state=initial_state, cu_seqlens=cu_seqlens, backend=self.backend, **self.options
        )

    def _slice(self, rows: slice) -> "LocalCall":
        pieces = Pieces(rows.stop - rows.start, rows.stop - rows.start, None)
        return replace(self, tensors=self.operator.take(self.tensors, rows), pieces=pieces)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        return d_out, *(torch.zeros_like(other) for other in ctx.saved_tensors)


def tie(out: Tensor, *others: Tensor) -> Tensor:
    """`out`, on which `others` have no influence but whose gradients go through them.

    A message comes back in the backward pass only where the loss depends on the one that was sent.
    """
    return _Tie.apply(out, *others)
