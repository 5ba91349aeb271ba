"""What works on channels after a mixer has worked on time: an MLP, or routed experts that are MLPs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from seqtrain.errors import ConfigError
from seqtrain.layers import upcast
from seqtrain.models.spiking import Spikes

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    # Squared ReLU (Primer, arXiv 2109.08668).
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class RouterConfig:
    """The keys under `model.router.`: how a token's experts are chosen and weighed."""

    # What makes scores of the router's logits: softmax over all experts, or a sigmoid of each.
    score: Literal["softmax", "sigmoid"] = "softmax"
    # True: the chosen experts' scores are divided by their sum.
    normalize: bool = True
    # Factor on the chosen experts' scores.
    scale: Annotated[float, Field(gt=0)] = 1.0
    # True: a bias for each expert is added where experts are chosen, and not where they are weighed (arXiv 2408.15664).
    bias: bool = False
    # Groups of experts, of which the best `chosen_groups` are looked into (DeepSeek-V3).
    groups: Annotated[int, Field(gt=0)] = 1
    chosen_groups: Annotated[int, Field(gt=0)] = 1
    # True: the shared expert is multiplied by a sigmoid of a projection (Qwen2-MoE).
    shared_gate: bool = False


class MLP(nn.Module):
    """`W3 (f(W1 x) * W2 x)` (Shazeer 2020, arXiv 2002.05202), W1 and W2 one matrix; `W3 f(W1 x)` without a gate.

    `gate_scale`, `out_scale`: factors on `W1 x` and on the result. `spike_rate`: where it is not 0, what enters both
    matrices is turned into spike counts first (see `Spikes`).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        gate_scale: float = 1.0,
        out_scale: float = 1.0,
        spike_rate: float = 0.0,
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        self.gate_scale, self.out_scale = gate_scale, out_scale
        self.enter = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.up = nn.Linear(width, (1 + gated) * hidden, bias=bias)
        self.leave = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.leave(activated(self.up(self.enter(x)), self.activation, self.gated, self.gate_scale))
        return self.out(x) if self.out_scale == 1 else self.out(x) * self.out_scale

    def flops(self, tokens: int) -> int:
        """Forward pass: those of the matrix products."""
        return 2 * tokens * (self.up.weight.numel() + self.out.weight.numel())


def activated(up: Tensor, activation: Activation, gated: bool, gate_scale: float = 1.0) -> Tensor:
    """`f(gate) * value` of `up: [...,2*hidden]`, or `f(up)` without a gate."""
    f = ACTIVATIONS[activation]
    if not gated:
        return f(up)
    gate, value = up.chunk(2, -1)
    return f(gate if gate_scale == 1 else gate * gate_scale) * value


class MoE(nn.Module):
    """Each token is worked on by `chosen` of `experts` MLPs, weighed by a router, and by a shared one if there is any.

    No token is dropped. The experts' matrices are one parameter each, `[experts, out, in]`.
    `latent`: width of the space the experts work in, by a projection before and after them; 0: the model's own.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        chosen: int,
        router: RouterConfig,
        shared: int = 0,
        latent: int = 0,
        activation: Activation = "silu",
        gated: bool = True,
    ):
        """`hidden`, `shared`: hidden channels of each expert and of the shared one. Raises `ConfigError`."""
        super().__init__()
        if chosen > experts:
            raise ConfigError(f"model.experts_per_token={chosen}: there are model.experts={experts}")
        if experts % router.groups or router.chosen_groups > router.groups:
            rule = f"must divide model.experts={experts}, and be model.router.chosen_groups={router.chosen_groups}"
            raise ConfigError(f"model.router.groups={router.groups}: {rule} or more")
        self.chosen, self.config = chosen, router
        self.activation, self.gated = activation, gated
        inner = latent or width
        self.router = nn.Linear(width, experts, bias=False)
        # Moved by rule and not by gradient.
        self.bias = nn.Parameter(torch.zeros(experts), requires_grad=False) if router.bias else None
        self.enter = nn.Linear(width, latent, bias=False) if latent else nn.Identity()
        self.up = nn.Parameter(torch.empty(experts, (1 + gated) * hidden, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))
        self.out = nn.Linear(latent, width, bias=False) if latent else nn.Identity()
        self.shared = MLP(width, shared, activation=activation, gated=gated) if shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared and router.shared_gate else None

    @property
    def last(self) -> Tensor:
        """What writes to the residual stream."""
        return self.out.weight if isinstance(self.out, nn.Linear) else self.down

    def forward(self, x: Tensor) -> Tensor:
        """`[...,D]` -> the same."""
        rows = x.flatten(0, -2)
        weights, chosen = self.route(rows)
        y = self.out(self.work(self.enter(rows), weights, chosen).to(x.dtype))
        if self.shared is not None:
            shared = self.shared(rows)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(rows)) * shared)
        return y.view(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`rows: [n,D]` -> the weights of each one's experts, `[n,chosen]` in float32 at least, and their numbers."""
        config = self.config
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(upcast(rows), upcast(self.router.weight))
        scores = logits.softmax(-1) if config.score == "softmax" else torch.sigmoid(logits)
        ranked = scores.detach() if self.bias is None else scores.detach() + self.bias
        if config.groups > config.chosen_groups:
            grouped = ranked.unflatten(1, (config.groups, -1))
            best = grouped.topk(min(2, grouped.shape[2]), -1).values.sum(-1).topk(config.chosen_groups, -1).indices
            open_ = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=rows.device).scatter_(1, best, True)
            ranked = grouped.masked_fill(~open_[..., None], -torch.inf).flatten(1)
        chosen = ranked.topk(self.chosen, -1).indices
        weights = scores.gather(1, chosen)
        if config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.scale, chosen

    def work(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum of what each row's experts make of it: rows `[n,D]`, sorted by expert, one product each."""
        order = chosen.flatten().argsort(stable=True)
        token = order // self.chosen
        counts = _counts(chosen, len(self.up))
        made = [
            F.linear(activated(F.linear(part, up), self.activation, self.gated), down)
            for part, up, down in zip(rows[token].split(counts), self.up.unbind(), self.down.unbind(), strict=True)
            if len(part)
        ]
        weighted = torch.cat(made) * weights.flatten()[order, None] if made else rows.new_empty(0, rows.shape[1])
        return torch.zeros_like(rows, dtype=weighted.dtype).index_add(0, token, weighted)

    def flops(self, tokens: int) -> int:
        """Forward pass: the matrix products of the router, the chosen experts and the shared one."""
        experts = self.chosen * (self.up[0].numel() + self.down[0].numel())
        others = sum(each.weight.numel() for each in self.modules() if isinstance(each, nn.Linear))
        return 2 * tokens * (experts + others)


def _counts(chosen: Tensor, experts: int) -> list[int]:
    """How many rows each expert has. Of tensors without numbers, which planning runs: the same for all."""
    if chosen.is_meta or is_fake(chosen):
        whole, rest = divmod(chosen.numel(), experts)
        return [whole + (index < rest) for index in range(experts)]
    return torch.bincount(chosen.flatten(), minlength=experts).tolist()
