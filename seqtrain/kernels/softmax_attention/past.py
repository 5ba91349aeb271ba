"""The keys and values before the first token: checking them, joining them to new ones, keeping the last of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.kernels.checks import check_state


@dataclass(frozen=True)
class Past:
    """Keys and values seen before: see the state of `softmax_attention`. `lengths`: `length` on the host."""

    k: Tensor
    v: Tensor
    length: Tensor
    lengths: tuple[int, ...]


def check_past(state: dict[str, Tensor] | None, k: Tensor, v: Tensor, states: int, packed: bool) -> Past | None:
    """`initial_state` as a `Past` in k's and v's dtypes, or None where nothing was seen. Raises `ValueError`."""
    if state is None:
        return None
    name = "softmax_attention"
    if set(state) != {"k", "v", "length"}:
        raise ValueError(f"{name}: initial_state has keys {sorted(state)}, expected k, v and length")
    rows = state["k"].shape[1]
    for key, new in (("k", k), ("v", v)):
        expected = (new.shape[0], rows, *new.shape[2:])
        check_state(f"{name}: {key} of", state[key], expected, k.device)
    length = state["length"]
    if length.dtype != torch.int64 or tuple(length.shape) != (states,):
        came = f"{length.dtype} {tuple(length.shape)}"
        raise ValueError(f"{name}: initial_state[length] is {came}, expected int64 ({states},)")
    lengths = tuple(length.tolist())
    if min(lengths) < 0 or (sum(lengths) != rows if packed else max(lengths) > rows):
        rule = "sum to" if packed else "be at most"
        raise ValueError(f"{name}: initial_state[length] is {lengths[:8]}, but must {rule} the S={rows} rows of k")
    return Past(state["k"].to(k.dtype), state["v"].to(v.dtype), length, lengths)


def joined(new: Tensor, old: Tensor, past: Past, cu_seqlens: Tensor | None) -> Tensor:
    """Old rows before new ones: `[B,S+T,...]`, or with documents each document's old rows before its new ones."""
    if cu_seqlens is None:
        return torch.cat([old, new], 1)
    parts = zip(old.split(past.lengths, 1), new.split(cu_seqlens.diff().tolist(), 1), strict=True)
    return torch.cat([rows for pair in parts for rows in pair], 1)


def kept(k: Tensor, v: Tensor, window: int | None, past: Past | None, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """The state after these tokens."""
    if cu_seqlens is not None:
        seen = cu_seqlens.to(device=k.device, dtype=torch.int64).diff()
    else:
        seen = torch.full((k.shape[0],), k.shape[1], dtype=torch.int64, device=k.device)
    if past is not None:
        k, v = joined(k, past.k, past, cu_seqlens), joined(v, past.v, past, cu_seqlens)
        seen = seen + past.length
    if window is None:
        return {"k": k, "v": v, "length": seen}
    length = seen.clamp(max=window - 1)
    if cu_seqlens is None:
        return {"k": _last(k, window - 1), "v": _last(v, window - 1), "length": length}
    rows = _packed_rows(seen.cumsum(0) - length, length)
    return {"k": k.index_select(1, rows), "v": v.index_select(1, rows), "length": length}


def _last(rows: Tensor, count: int) -> Tensor:
    """The last `count` rows, after zeros where there are fewer; a copy, so that the others can be freed."""
    last = rows[:, max(rows.shape[1] - count, 0) :]
    missing = count - last.shape[1]
    return torch.cat([last.new_zeros(last.shape[0], missing, *last.shape[2:]), last], 1) if missing else last.clone()


def _packed_rows(start: Tensor, length: Tensor) -> Tensor:
    """int64 row numbers `start[n] ... start[n] + length[n] - 1` for each n, one after the other."""
    before = length.cumsum(0) - length
    total = int(length.sum())
    return torch.arange(total, device=length.device) + torch.repeat_interleave(
        start - before, length, output_size=total
    )


def pairs_seen(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees in one row: `window` keys each, fewer for the first tokens."""
    seen = tokens if window is None else min(tokens, window)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
