"""Our operators behind the signatures of transformers' functions, by the names that its modules call them by.

Each computes what its namesake in transformers' modelling files does on a whole sequence, and knows documents besides:
where the row is packed (`PACKED`), states and convolutions begin anew at every boundary.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.kernels import delta_rule, diagonal_scan, linear_attention, short_convolution
from seqtrain.layers import upcast

# The boundaries of the documents in this call's rows, one row behind the other: int64 `[N+1]`; None: not packed.
PACKED: ContextVar[Tensor | None] = ContextVar("PACKED", default=None)


def _over_time(operator: Callable[..., Any], *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
    """`operator` on `[B,T,...]`, document by document; packed rows have no state before, and None after."""
    boundaries = PACKED.get()
    if boundaries is None:
        return operator(*tensors, **options)
    assert options.get("initial_state") is None, "a packed row continues no cache"
    rows = [x.flatten(0, 1)[None] if x is not None and x.dim() > 2 else x for x in tensors]
    out, _ = operator(*rows, cu_seqlens=boundaries, **options)
    assert tensors[0] is not None
    return out[0].unflatten(0, tensors[0].shape[:2]), None


def positions(boundaries: Tensor, shape: torch.Size) -> Tensor:
    """Every token's place in its document, int64 of `shape`, `[B,T]`."""
    tokens = torch.arange(shape.numel(), device=boundaries.device)
    return (tokens - boundaries[torch.searchsorted(boundaries, tokens, right=True) - 1]).view(shape)


def create_causal_mask(**options: Any) -> Any:
    """transformers' mask, told of documents by a model that does not tell it."""
    from transformers.masking_utils import create_causal_mask as create

    if (boundaries := PACKED.get()) is not None:
        options["position_ids"] = positions(boundaries, options["inputs_embeds"].shape[:2])
    return create(**options)


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """`hidden_states`, the result: `[B,D,T]`; `weight: [D,W]`."""
    fused = activation in ("silu", "swish")
    x = hidden_states.to(weight.dtype).transpose(1, 2)
    out, _ = _over_time(_convolution, x, weight, bias, activation="silu" if fused else "none")
    if activation is not None and not fused:
        from transformers.activations import ACT2FN

        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype).transpose(1, 2)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return short_convolution(x, weight, bias, **options)


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, keep: bool, unit: bool
) -> tuple[Tensor, Tensor | None]:
    """`g: [B,T,H]` (Gated DeltaNet) or `[B,T,H,K]` (KDA); fewer heads of `query` and `key` serve H of `value`."""
    if unit:
        query, key = (_unit(x) for x in (query, key))
    if (groups := value.shape[2] // key.shape[2]) > 1:
        query, key = (x.repeat_interleave(groups, 2) for x in (query, key))
    query, key = query.to(value.dtype), key.to(value.dtype)
    out, final = _over_time(delta_rule, query, key, value, beta, upcast(g), initial_state=state)
    return out, final if keep else None


def _unit(x: Tensor) -> Tensor:
    x = upcast(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def torch_chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    return _delta_rule(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def torch_recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    return _delta_rule(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)


chunk_kimi_delta_attention = torch_chunk_gated_delta_rule
recurrent_kimi_delta_attention = torch_recurrent_gated_delta_rule


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """`hidden_states: [B,T,H,P]`, `dt: [B,T,H]`, `A: [H]`, `B, C: [B,T,G,N]`; states `[B,H,P,N]`, ours transposed."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = upcast((F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit))
    x = upcast(hidden_states)
    heads = x.shape[2] // B.shape[2]
    # A view where there is one group.
    B, C = (upcast(part).unsqueeze(3).expand(-1, -1, -1, heads, -1).flatten(2, 3) for part in (B, C))
    past = None if initial_states is None else initial_states.mT
    out, final = _over_time(
        linear_attention, C, B, x * dt[..., None], A.to(dt.dtype) * dt, scale=1.0, initial_state=past
    )
    out = out if D is None else out + D[:, None] * x
    return (out, final.mT) if return_final_states else out


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Any:
    """`hidden_states, dt, z: [B,D,T]`, `A: [D,N]`, `B, C: [B,N,T]`; the last state `[B,D,N]`."""
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
    dt = upcast(F.softplus(dt) if delta_softplus else dt).transpose(1, 2)[..., None]  # B T D 1
    x = upcast(hidden_states).transpose(1, 2)[..., None]
    update = dt * x * B.transpose(1, 2)[:, :, None].to(x.dtype)  # B T D N
    states, final = _over_time(diagonal_scan, update.flatten(2), (dt * A).flatten(2))
    out = torch.einsum("btdn,bnt->bdt", states.unflatten(2, A.shape), C.to(states.dtype))
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * F.silu(z)
    return (out, final.unflatten(1, A.shape).to(hidden_states.dtype)) if return_last_state else out


def _none(*args: Any, **kwargs: Any) -> None:
    """The fused forms of a whole layer, which know no documents; None is their way to say that they are not there."""


# What modules call, by the name they call it by; single steps of convolutions and scans stay as they are.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        causal_conv1d_fn,
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
        mamba2_chunk_scan,
        mamba_selective_scan,
    )
} | {
    "chunk_kimi_delta_attention": chunk_kimi_delta_attention,
    "recurrent_kimi_delta_attention": recurrent_kimi_delta_attention,
}
# Beside one of the above.
FUSED = {"mamba_inner_fn": _none, "mamba2_split_conv1d_scan_combined": _none}
# What whole models call.
MASKS: dict[str, dict[str, Callable[..., Any]]] = {"GraniteMoeHybridModel": {"create_causal_mask": create_causal_mask}}


def causal_convolution(self: nn.Conv1d, x: Tensor) -> Tensor:
    """A depthwise `nn.Conv1d` padded on both sides, cut to the tokens there are: `[B,D,T]` as it comes."""
    return causal_conv1d_fn(x, self.weight[:, 0], self.bias)


def rnn_scan(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """RecurrentGemma's RG-LRU: `h_t = gate_t h_{t-1} + x_t`, forgotten where `reset`, `[B,T,1]`."""
    # Below what a float32 state can notice, and with a finite logarithm.
    log_gate = upcast(recurrent_gate).clamp(min=1e-30).log()
    log_gate = torch.where(reset, log_gate.new_tensor(-1e4), log_gate)
    # The first token of a row decays the state before it, which is that of a new row where it is reset.
    out, final = diagonal_scan(upcast(hidden_states), log_gate, initial_state=recurrent_states)
    return out.to(hidden_states.dtype), final.to(acc_dtype)


def lightning_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """MiniMax's layer: linear attention with a constant decay per head, `slope_rate: [H,1,1]`."""
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
    qkv = qkv.unflatten(2, (self.num_attention_heads, 3 * self.head_dim))
    past = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
    decay = upcast(-self.slope_rate.flatten()).expand(qkv.shape[:3])
    out, state = _over_time(linear_attention, *qkv.split(self.head_dim, 3), decay, scale=1.0, initial_state=past)
    out = self.norm(out.flatten(2))
    out = self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * out)
    if past_key_values is not None:
        state = state.to(qkv.dtype)
        past_key_values.set_linear_cache(self.layer_idx, state)
    return out, state


# Classes that call no such function: what takes the place of their methods, and of those of their parts.
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "RecurrentGemmaRecurrentBlock": {"conv_1d.forward": causal_convolution, "rg_lru._rnn_scan": rnn_scan},
    "MiniMaxLightningAttention": {"forward": lightning_attention},
}
# Recurrent classes that stay as they are, and why.
KEPT = {
    "xLSTMBackend": "its states are relative to a running maximum of the gates, which no operator here carries",
}
