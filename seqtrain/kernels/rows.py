"""The rows or documents of a call as pieces of one flat row of tokens, for operators that look back a fixed way."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each of N pieces lies in the flat row. `start`, `length`: int64 `[N]`; `alike`: all have one length."""

    start: Tensor
    length: Tensor
    alike: bool = False

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None) -> "Rows":
        """Those of `x: [B,T,...]`: its B rows, or the documents of its one row."""
        if cu_seqlens is None:
            start = torch.arange(x.shape[0], device=x.device) * x.shape[1]
            return Rows(start, torch.full_like(start, x.shape[1]), alike=True)
        boundaries = cu_seqlens.to(device=x.device, dtype=torch.int64)
        return Rows(boundaries[:-1], boundaries.diff())

    def places(self, total: int) -> tuple[Tensor, Tensor]:
        """For each of `total` tokens: the piece it is in and its distance from that piece's start, int64 `[total]`."""
        piece = torch.repeat_interleave(self.length, output_size=total)
        return piece, torch.arange(total, device=self.start.device) - self.start[piece]

    def after(self, past: Tensor, new: Tensor, index: Tensor) -> Tensor:
        """Tokens `index: int64 [N,R]` of each piece's past `[N,P,...]` followed by its new ones, flat `[total,...]`."""
        count = past.shape[1]
        piece = torch.arange(past.shape[0], device=past.device)[:, None]
        rows = torch.cat([past.flatten(0, 1), new])
        fresh = past.shape[0] * count + self.start[:, None] + index - count
        return rows[torch.where(index < count, piece * count + index, fresh)]

    def last(self, past: Tensor, new: Tensor) -> Tensor:
        """The last P tokens of each piece's past `[N,P,...]` followed by its new ones, flat `[total,...]`."""
        count = past.shape[1]
        if not self.alike:
            return self.after(past, new, self.length[:, None] + torch.arange(count, device=past.device))
        # Decoding, token by token: without the numbers of rows, which take longer than the rows.
        rows = new.unflatten(0, (past.shape[0], new.shape[0] // past.shape[0]))
        held = max(0, count - rows.shape[1])
        return torch.cat([past[:, count - held :], rows[:, rows.shape[1] - (count - held) :]], 1)
