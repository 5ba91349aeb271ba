"""FLOPs and states of a mixer, counted by running it on the meta device, where tensors have shapes and no numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqtrain.parallel.both_ways import BothWays
from seqtrain.parallel.sequence import SequenceContext


@dataclass(frozen=True)
class Counts:
    """Multiply-adds times two of a forward pass, and the state after it, on the meta device."""

    flops: int
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Layers that are counted once: of one config and size, with parameters of the same shapes, at whatever depth."""

    cls: Callable[..., nn.Module]
    config: Any
    sizes: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...]
    shape: Any = field(compare=False)


@lru_cache(maxsize=4096)
def count(kind: Kind, batch: int, tokens: int) -> Counts:
    """What a mixer needs for `batch` sequences of `tokens` each, and the state it leaves."""
    # It imports Triton.
    from torch.utils.flop_counter import FlopCounterMode

    mixer, sequence, products = _on_meta(kind), CountingContext(), FlopCounterMode(display=False)
    x = torch.empty(batch, tokens, kind.shape.width, device="meta")
    read = BothWays.of(sequence) if kind.shape.encoder else sequence
    with torch.no_grad(), torch.autocast("cpu", enabled=False), products:
        _, state = mixer(x, sequence=read)
    return Counts(products.get_total_flops() + sum(sequence.flops), state)


@lru_cache(maxsize=256)
def _on_meta(kind: Kind) -> nn.Module:
    with torch.device("meta"):
        return kind.cls(kind.config, kind.shape)


@dataclass(frozen=True)
class CountingContext(SequenceContext):
    """A sequence whose operators are not run: each adds its FLOPs, and is answered by tensors of its shapes."""

    counts: ClassVar[bool] = True

    flops: list[int] = field(default_factory=list)
    size: int | None = None

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> "CountingContext":
        return replace(self, size=size)

    def run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        given, options = operator.arranged(tensors, options)
        tokens, batch = given[0].shape[1], given[0].shape[0]
        # A group knows nothing of the one before: attention over all of it keeps at most `size - 1` keys for the next.
        size = self.size or tokens
        for length, times in ((size, tokens // size), (tokens % size, 1)) if tokens else ():
            self.flops.append(times * operator.flops(operator.take(given, slice(0, length)), options))
        if self.size and "window" in options:
            options["window"] = self.size
        state = operator.state_shape(given, options, batch)
        kept = {key: _empty(*each) for key, each in state.items()} if isinstance(state, dict) else _empty(*state)
        return given[0].new_empty(operator.out_shape(given, options)), kept


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
