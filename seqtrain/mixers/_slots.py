"""Operators whose key heads serve several query heads, and gated slot attention's two passes over them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from seqtrain.kernels import linear_attention, slot_scores
from seqtrain.layers import upcast
from seqtrain.mixers._base import State
from seqtrain.mixers._costs import linear_attention_flops
from seqtrain.parallel.sequence import SequenceContext


def run_grouped(
    sequence: SequenceContext, operator: Callable, q: Tensor, *written: Tensor | None, scale: float, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`operator` with every key head's tensors and state used by its query heads; the state is one a key head."""
    assert written[0] is not None
    repeat = q.shape[2] // written[0].shape[2]
    if repeat == 1:
        return sequence.run(operator, q, *written, scale=scale, initial_state=past)
    # Heads, not rows: query heads h*R ... h*R + R - 1 share key head h.
    each = [None if tensor is None else tensor.repeat_interleave(repeat, 2) for tensor in written]
    state = None if past is None else past.repeat_interleave(repeat, 1)
    out, state = sequence.run(operator, q, *each, scale=scale, initial_state=state)
    return out, state[:, ::repeat].contiguous()


def slot_attention(
    q: Tensor, written: Mapping[str, Tensor], past: Mapping[str, Tensor], sequence: SequenceContext, *, scale: float
) -> tuple[Tensor, State]:
    """GSA's two passes. `q: [B,T,H,K]`; k `[B,T,G,K]`, v `[B,T,G,V]`, log_decay `[B,T,G,M]` -> `[B,T,H,V]`, state.

    Slot m holds `K_t[m] = a_t[m] K_{t-1}[m] + (1 - a_t[m]) k_t`, `V_t[m]` likewise; `o_t = softmax(scale q_t K_t) V_t`.
    """
    k, v, decay = written["k"], written["v"], written["log_decay"]
    taken = -torch.expm1(decay).to(v.dtype)
    scores, keys = run_grouped(sequence, slot_scores, q, k, taken, decay, scale=scale, past=past.get("slot_keys"))
    weights = upcast(scores).softmax(-1).to(v.dtype)
    out, values = run_grouped(
        sequence, linear_attention, weights, taken, v, decay, scale=1.0, past=past.get("slot_values")
    )
    return out, {"slot_keys": keys, "slot_values": values}


def slot_shapes(batch: int, groups: int, slots: int, key: int, value: int) -> dict[str, tuple[int, ...]]:
    """Of the two states of `slot_attention`."""
    return {"slot_keys": (batch, groups, slots, key), "slot_values": (batch, groups, slots, value)}


def slot_flops(tokens: int, heads: int, slots: int, key: int, value: int) -> int:
    """Of the two recurrences of `slot_attention`."""
    first = linear_attention_flops(tokens, heads * slots, key, 1)
    return first + linear_attention_flops(tokens, heads, slots, value)
