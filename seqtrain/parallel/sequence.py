"""What a layer needs to know of the sequence it is given: where documents start, which tokens this process holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """A batch of tokens held whole by this process; mixers call their operators through `run`.

    `cu_seqlens`: int `[N+1]`, document borders of a packed row (then B == 1), or None for B separate rows.
    `backend`: the kernels' backend for every operator, `"auto"` to choose by device.
    """

    cu_seqlens: Tensor | None = None
    backend: str = "auto"

    def run(
        self, operator: Callable, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """`operator(*tensors, ...)` on this sequence: `(out, final_state)`, one state a document (or row)."""
        return operator(
            *tensors, initial_state=initial_state, cu_seqlens=self.cu_seqlens, backend=self.backend, **options
        )

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """int64 `[T]`: each token's distance from the start of its document (or row)."""
        index = torch.arange(tokens, device=device)
        if self.cu_seqlens is None:
            return index
        borders = self.cu_seqlens.to(device=device, dtype=torch.int64)
        document = torch.searchsorted(borders, index, right=True) - 1
        return index - borders[document]
