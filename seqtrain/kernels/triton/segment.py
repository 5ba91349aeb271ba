"""Launches the kernels of `weighted`: linear attention on a segment of a sharded sequence, as differentiable operators.

The backward pass recomputes weights from the decays; only the sums of complete chunks are kept.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.triton import weighted

# For 16-bit x: as few blocks as registers allow, since each reads its tokens again.
_PINNED = {
    "gather": gpu.Launch(warps=4, sizes={"BK": 64, "BV": 128}),
    "spread": gpu.Launch(warps=4, sizes={"BK": 32, "BV": 128}),
    "weigh": gpu.Launch(warps=8, sizes={"BK": 64, "BV": 64}),
}
# For wider x, whose products take three times the operands.
_PINNED_WIDE = {
    "gather": gpu.Launch(warps=4, sizes={"BK": 32, "BV": 64}),
    "spread": gpu.Launch(warps=8, sizes={"BK": 32, "BV": 32}),
    "weigh": gpu.Launch(warps=4, sizes={"BK": 32, "BV": 32}),
}


def find_map(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As that of the chunked form."""
    update, total = _find_map(k, v, log_decay)
    return None if log_decay is None else total.exp(), update


def read(q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, out: Tensor) -> Tensor:
    """As that of the chunked form."""
    return _read(q, out, log_decay, state, scale)[0]


def _map_forward(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(update, total, around)`: total, the sum of the decays, and around, which is kept; empty without decays."""
    call = _Call.of(k, v, log_decay, to_end=True)
    sums = call.sum_chunks()
    around = _exclusive(sums, reverse=True) * math.log2(math.e)
    total = sums.sum(1) if log_decay is not None else sums
    return call.gather(around, 1.0), total, around


def _map_shapes(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, key = k.shape
    dtype = state_dtype(k.dtype)
    around = k.new_empty(_around_shape(k, log_decay), dtype=dtype)
    total = around if log_decay is None else around[:, 0]
    return k.new_empty(batch, heads, key, v.shape[3], dtype=dtype), torch.empty_like(total), around


def _map_backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    k, v, log_decay = arguments
    call = _Call.of(k, v, log_decay, to_end=True)
    d_update, d_total = (x.contiguous() for x in gradients)
    d_v = call.spread(d_update, None, kept[0], 1.0)
    d_k, d_log = call.weigh(d_update, kept[0], 1.0, d_total)
    return d_k, d_v, d_log


def _read_forward(
    q: Tensor, base: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(out, around)`: `base` and what q reads."""
    call = _Call.of(q, base, log_decay, to_end=False)
    around = _exclusive(call.sum_chunks(), reverse=False) * math.log2(math.e)
    return call.spread(state.contiguous(), call.y, around, scale), around


def _read_shapes(
    q: Tensor, base: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    return out, q.new_empty(_around_shape(q, log_decay), dtype=state_dtype(q.dtype))


def _read_backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    q, base, log_decay, state, scale = arguments
    call = _Call.of(q, gradients[0], log_decay, to_end=False)
    d_state = call.gather(kept[0], scale)
    d_q, d_log = call.weigh(state.contiguous(), kept[0], scale)
    return d_q, gradients[0].to(base.dtype), d_log, d_state.to(state.dtype), None


_find_map = differentiable("segment_map", _map_forward, _map_backward, _map_shapes, results=2)
_read = differentiable("segment_read", _read_forward, _read_backward, _read_shapes, results=1)


@dataclass
class _Call:
    """Rows x `[B,T,H,K]` and y `[B,T,H,V]`, contiguous, and what all launches share."""

    x: Tensor
    y: Tensor
    log_decay: Tensor | None
    to_end: bool

    @classmethod
    def of(cls, x: Tensor, y: Tensor, log_decay: Tensor | None, *, to_end: bool) -> "_Call":
        log_decay = None if log_decay is None else log_decay.contiguous()
        return cls(x.contiguous(), y.contiguous(), log_decay, to_end)

    @property
    def decay(self) -> int:
        """DECAY of the kernels."""
        return 0 if self.log_decay is None else self.log_decay.dim() - 2

    @property
    def chunk(self) -> int:
        return _chunk_length(self.x.dtype)

    @property
    def chunks(self) -> int:
        """Of all heads of all rows."""
        batch, tokens, heads, _ = self.x.shape
        return batch * heads * triton.cdiv(tokens, self.chunk)

    def sum_chunks(self) -> Tensor:
        """Decays of each chunk summed, `[B, chunks, H]` or `[B, chunks, H, K]`; empty without decays."""
        log_decay, dtype = self.log_decay, state_dtype(self.x.dtype)
        if log_decay is None:
            return self.x.new_empty(0, dtype=dtype)
        whole = log_decay.shape[1] // self.chunk * self.chunk
        sums = log_decay[:, :whole].unflatten(1, (-1, self.chunk)).sum(2, dtype=dtype)
        rest = log_decay[:, whole:].sum(1, keepdim=True, dtype=dtype)
        return torch.cat([sums, rest], 1) if whole < log_decay.shape[1] else sums

    def gather(self, around: Tensor, scale: float) -> Tensor:
        """`S` `[B,H,K,V]` of x and y."""
        (batch, tokens, heads, key), value = self.x.shape, self.y.shape[3]
        launch = self._pinned("gather")
        blocks = batch * heads * triton.cdiv(key, launch.sizes["BK"]) * triton.cdiv(value, launch.sizes["BV"])
        # Cut so that programs fill a GPU.
        slabs = max(1, min(gpu.PROGRAMS // blocks, triton.cdiv(tokens, self.chunk)))
        out = around.new_empty(slabs, batch, heads, key, value)
        tensors = (self.x, self.y, self.log_decay, around, out)
        self._launch(weighted.gather, launch, slabs * blocks, *tensors, tokens, slabs, scale)
        return out[0] if slabs == 1 else out.sum(0)

    def spread(self, state: Tensor, base: Tensor | None, around: Tensor, scale: float) -> Tensor:
        """What x gets of `state`, in y's shape and dtype, added to `base`."""
        out = self.y.new_empty(self.y.shape)
        launch = self._pinned("spread")
        programs = self.chunks * triton.cdiv(self.y.shape[3], launch.sizes["BV"])
        tensors = (self.x, state.to(self.x.dtype), base, self.log_decay, around, out)
        self._launch(weighted.spread, launch, programs, *tensors, self.x.shape[1], scale)
        return out

    def weigh(
        self, state: Tensor, around: Tensor, scale: float, d_total: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`(d_x, d_log)`; d_total: the gradient of the sum of all decays."""
        d_x, totals = torch.empty_like(self.x), torch.empty_like(around)
        d_log = None if self.log_decay is None else torch.empty_like(self.log_decay, dtype=around.dtype)
        tensors = (self.x, self.y, state.to(self.x.dtype), self.log_decay, around, d_x, d_log, totals)
        tokens = self.x.shape[1]
        self._launch(weighted.weigh, self._pinned("weigh"), self.chunks, *tensors, tokens, scale)
        if d_log is None or self.log_decay is None:
            return d_x, None
        others = _exclusive(totals, reverse=not self.to_end)
        if d_total is not None:
            others += d_total[:, None]
        whole = tokens // self.chunk
        d_log[:, : whole * self.chunk].unflatten(1, (-1, self.chunk)).add_(others[:, :whole, None])
        d_log[:, whole * self.chunk :] += others[:, whole:]
        return d_x, d_log.to(self.log_decay.dtype)

    def _pinned(self, kernel: str) -> gpu.Launch:
        return pinned(gpu.target(), kernel, self.x.shape[3], self.y.shape[3], self.x.dtype)

    def _launch(self, kernel: Any, launch: gpu.Launch, programs: int, *arguments: Any) -> None:
        if programs == 0:
            return
        (_, _, heads, key), value = self.x.shape, self.y.shape[3]
        flags = {"TO_END": self.to_end, "DECAY": self.decay, "PRECISION": gpu.PRECISION[gpu.target()]}
        accumulator = gpu.triton_dtype(state_dtype(self.x.dtype))
        with gpu.on_device(self.x):
            kernel[(programs,)](*arguments, **launch.options(H=heads, K=key, V=value, ACC=accumulator, **flags))


def pinned(target: str, kernel: str, key_width: int, value_width: int, dtype: torch.dtype) -> gpu.Launch:
    """How `kernel` of `weighted` is launched on `target`, for x of this dtype: chosen by what it compiles to."""
    launch = (_PINNED if dtype.itemsize < 4 else _PINNED_WIDE)[kernel]
    widths = {"BK": key_width, "BV": value_width}
    sizes = {name: min(size, triton.next_power_of_2(max(widths[name], 16))) for name, size in launch.sizes.items()}
    return replace(
        launch, stages=1 if target in ("sm_100", "gfx942") else 2, sizes={"BT": _chunk_length(dtype), **sizes}
    )


def _chunk_length(dtype: torch.dtype) -> int:
    """Tokens a chunk, for x of this dtype; on every GPU the same, since the shape of what is kept depends on it."""
    return 32 if dtype.itemsize >= 4 else 64


def _around_shape(x: Tensor, log_decay: Tensor | None) -> tuple[int, ...]:
    if log_decay is None:
        return (0,)
    return (log_decay.shape[0], -(-log_decay.shape[1] // _chunk_length(x.dtype)), *log_decay.shape[2:])


def _exclusive(sums: Tensor, *, reverse: bool) -> Tensor:
    """Sums of the chunks before each chunk, or after it; over just those, so that small ones stay exact."""
    if sums.dim() == 1:
        return sums
    if reverse:
        return _exclusive(sums.flip(1), reverse=False).flip(1)
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1].cumsum(1)], 1)
