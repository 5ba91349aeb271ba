"""Softmax attention over a sliding window and a document's first tokens, which may share its softmax with a memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.checks import check_documents, check_state
from seqtrain.kernels.documents import state_dtype
from seqtrain.kernels.operator import Inputs, operator
from seqtrain.kernels.rows import Rows
from seqtrain.kernels.segments import PastKeysAndSinks
from seqtrain.kernels.softmax_attention.past import pairs_seen

__all__ = ["sink_attention"]


@dataclass(frozen=True)
class Known:
    """What backends are told next to the new tokens. `rows`: where pieces of the flat row lie; `past`, `after`: the
    states before and after it; `fresh`: no token was seen before.
    """

    rows: Rows
    past: dict[str, Tensor]
    after: dict[str, Tensor]
    fresh: bool


def _states(*, G: int, K: int, V: int, window: int, sinks: int = 0, **_: Any) -> dict[str, tuple[int, ...]]:
    near, first = window - 1, sinks
    return {"k": (near, G, K), "v": (near, G, V), "sink_k": (first, G, K), "sink_v": (first, G, V), "length": ()}


def _flops(*, B: int, T: int, H: int, K: int, V: int, window: int, sinks: int = 0, **_: Any) -> int:
    return 2 * B * H * (K + V) * pairs_seen(T, window + sinks)


@operator(
    arguments={"q": "B T H K", "k": "B T G K", "v": "B T G V", "extra_score": "B T H", "extra_value": "B T H V"},
    out="B T H V",
    state=_states,
    state_from=("k",),
    state_dtype=lambda dtype: dtype,
    flops=_flops,
    backends=("reference", "chunked"),
    time=PastKeysAndSinks(),
)
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_score: Tensor | None = None,
    extra_value: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    initial_state: dict[str, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`out_t = sum_s p_s v_s + p_extra extra_value_t`, p the softmax of `scale * q_t . k_s` and `extra_score_t`.

    s runs over the last `window` tokens, t's own included, and the first `sinks` tokens of t's row or document
    (StreamingLLM, arXiv 2309.17453), each once. The extra entry stands for what lies between, as some memory gives it:
    a score of -inf leaves it out, and both terms are under one maximum.
    `q`: `[B,T,H,K]`. `k`: `[B,T,G,K]`, `v`: `[B,T,G,V]`, floating, H a multiple of G. `extra_score`: `[B,T,H]`,
    `extra_value`: `[B,T,H,V]`, or neither. `scale` defaults to `K ** -0.5`. `cu_seqlens`: int `[N+1]`, document
    boundaries of a packed row (then B == 1).

    The state is what continuing needs, of the same size for any T: `dict(k=[B,window-1,G,K], v=[B,window-1,G,V],
    sink_k=[B,sinks,G,K], sink_v=[B,sinks,G,V], length=int64 [B])`, N for B with documents. `length` counts the tokens
    seen; rows of tokens that were not are zero. It has the inputs' dtype.

    Returns `out`, `[B,T,H,V]` in v's dtype, and the state. Raises `ValueError` for a wrong shape, dtype, device, window
    or backend. Backends: `reference`, `chunked` (PyTorch; time and memory linear in T).
    """
    name = "sink_attention"
    if (extra_score is None) != (extra_value is None):
        raise ValueError(f"{name}: extra_score and extra_value come together or not at all")
    sizes = sink_attention.check((q, k, v, extra_score, extra_value))
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{name}: q has H={sizes['H']} heads, expected a multiple of k's G={sizes['G']}")
    if window < 1 or sinks < 0:
        raise ValueError(f"{name}: window={window} and sinks={sinks}, expected at least 1 and at least 0")
    states = check_documents(name, cu_seqlens, sizes["B"], sizes["T"])
    past = _past(initial_state, k, v, states, window, sinks)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    rows = Rows.of(k, cu_seqlens)
    flat = [None if tensor is None else tensor.flatten(0, 1) for tensor in (q, k, v, extra_score, extra_value)]
    after = _after(k.flatten(0, 1), v.flatten(0, 1), past, rows)
    run = sink_attention.choose(backend, q.device)
    out = run(flat, window, scale, Known(rows, past, after, fresh=initial_state is None))
    return out.view(*q.shape[:3], v.shape[3]).to(v.dtype), after


def _past(
    state: dict[str, Tensor] | None, k: Tensor, v: Tensor, states: int, window: int, sinks: int
) -> dict[str, Tensor]:
    """The state before the first token, of an empty past where it is None. Raises `ValueError`."""
    one = _states(G=k.shape[2], K=k.shape[3], V=v.shape[3], window=window, sinks=sinks)
    shapes = {key: (states, *shape) for key, shape in one.items()}
    if state is None:
        # An entry's last letter says whose dtype it has.
        like = {"k": k, "v": v, "h": torch.zeros(0, dtype=torch.int64, device=k.device)}
        return {key: like[key[-1]].new_zeros(shape) for key, shape in shapes.items()}
    if set(state) != set(shapes):
        raise ValueError(f"sink_attention: initial_state has keys {sorted(state)}, expected {sorted(shapes)}")
    for key, shape in shapes.items():
        check_state(f"sink_attention: {key} of", state[key], shape, k.device)
    return {key: value if key == "length" else value.to(k.dtype) for key, value in state.items()}


def _after(k: Tensor, v: Tensor, past: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """The state after flat `k`, `v` `[total,G,K]`."""
    sinks = past["sink_k"].shape[1]
    first = torch.arange(sinks, device=k.device) - past["length"][:, None]
    new = (first >= 0) & (first < rows.length[:, None])
    # The sinks held, then the row's new tokens.
    index = torch.where(new, first + sinks, torch.arange(sinks, device=k.device))
    after = {"length": past["length"] + rows.length}
    for key, tensor in {"k": k, "v": v}.items():
        after[key] = rows.last(past[key], tensor)
        after[f"sink_{key}"] = rows.after(past[f"sink_{key}"], tensor, index)
    return after


def reference(inputs: Inputs, window: int, scale: float, known: Known) -> Tensor:
    """The definition: one softmax per token over what it sees; arguments as those of the chunked form."""
    q, k, v, extra_score, extra_value = inputs
    dtype, repeat = state_dtype(q.dtype), q.shape[1] // k.shape[1]
    past, pieces, outs = known.past, zip(known.rows.start.tolist(), known.rows.length.tolist(), strict=True), []
    for n, (start, length) in enumerate(pieces):
        seen = int(past["length"][n])
        sinks = list(zip(past["sink_k"][n], past["sink_v"][n], strict=True))
        tail = list(zip(past["k"][n], past["v"][n], strict=True))
        # Keys and values by their place in the document, as sinks and as recent tokens.
        first = dict(enumerate(sinks[:seen]))
        recent = {place: pair for place, pair in enumerate(tail, seen - len(tail)) if place >= 0}
        for t in range(start, start + length):
            place = seen + t - start
            first[place] = recent[place] = k[t], v[t]
            near = range(max(place - window + 1, 0), place + 1)
            visible = [first[s] for s in range(min(len(sinks), near[0]))] + [recent[s] for s in near]
            keys = torch.stack([key for key, _ in visible]).to(dtype).repeat_interleave(repeat, 1)  # S H K
            values = torch.stack([value for _, value in visible]).to(dtype).repeat_interleave(repeat, 1)  # S H V
            scores = torch.einsum("hk,shk->hs", q[t].to(dtype), keys) * scale
            if extra_score is not None and extra_value is not None:
                scores = torch.cat([scores, extra_score[t, :, None]], 1)
                values = torch.cat([values, extra_value[None, t].to(dtype)])
            outs.append(torch.einsum("hs,shv->hv", scores.softmax(1), values))
    return torch.stack(outs) if outs else q.new_empty(0, q.shape[1], v.shape[2])
