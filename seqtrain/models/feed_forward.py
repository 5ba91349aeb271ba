"""What works on channels after a mixer has worked on time: an MLP, or routed experts that are MLPs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

from seqtrain.errors import ConfigError
from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.kernels import linear_swiglu, swiglu
from seqtrain.layers import Adapters, Linear, fused, upcast
from seqtrain.mixers.common.base import even_share
from seqtrain.models.spiking import Spikes
from seqtrain.parallel.experts import dispatch_and_combine, local_experts
from seqtrain.parallel.recompute import made_again
from seqtrain.parallel.tensor import ALONE, RowLinear, TensorParallel
from seqtrain.validation import AUTO, OrAuto

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
    # What a step adds to the bias of an expert that has had fewer tokens than the mean, and takes off one that has had
    # more. auto: 0.001, and 0 for a pretrained model.
    bias_rate: Annotated[float, Field(ge=0), OrAuto] = AUTO
    # Groups of experts (DeepSeek-V3).
    groups: Annotated[int, Field(gt=0)] = 1
    # Groups, the best for a token, among which its experts are chosen.
    chosen_groups: Annotated[int, Field(gt=0)] = 1
    # Factor of the balance loss, which is 1 where experts are used alike (Switch, arXiv 2101.03961); 0: none.
    balance: Annotated[float, Field(ge=0)] = 0.0
    # Factor of the router's z-loss, which keeps its logits small (ST-MoE, arXiv 2202.08906); 0: none.
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    # True: the shared expert is multiplied by a sigmoid of a projection (Qwen2-MoE).
    shared_gate: bool = False

    @property
    def moves(self) -> float:
        """By how much a step moves each expert's bias."""
        return 0.0 if not self.bias else 1e-3 if self.bias_rate == AUTO else self.bias_rate


@dataclass(frozen=True)
class Routed:
    """What a layer's router did with the tokens of a forward pass.

    `counts`: int64 `[experts]`, tokens that each works on. `shares`: `[experts]`, the sum over tokens of their scores,
    those of a token adding up to 1. `squares`: the sum of the squared logsumexp of their logits. The last two are with
    their graph, and 0 where no loss asks for them.
    """

    counts: Tensor
    shares: Tensor
    squares: Tensor


class SwiGLULinear(Linear):
    """Both matrices into the hidden channels, `[2H,D]`, SwiGLU in their product's epilogue: `[...,D]` -> `[...,H]`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_swiglu(x, self.weight.unflatten(0, (2, -1)))


class MLP(nn.Module):
    """`W3 (f(W1 x) * W2 x)` (Shazeer 2020, arXiv 2002.05202), W1 and W2 one matrix; `W3 f(W1 x)` without a gate.

    `gate_scale`, `out_scale`: factors on `W1 x` and on the result. `epilogue`: see `SwiGLULinear`.
    `adapter_rank`: of what is added to `W1 x` and `W2 x` where layers share them; 0: nothing. `tensor`: ranks over
    which hidden channels are divided. Raises `ConfigError`.
    """

    # Whether ranks exchange anything in it.
    sends: ClassVar[bool] = False

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
        epilogue: bool = False,
        adapter_rank: int = 0,
        tensor: TensorParallel = ALONE,
    ):
        super().__init__()
        hidden = even_share(hidden, tensor, f"model.mlp_width={hidden}")
        self.activation, self.gated, self.tensor = activation, gated, tensor
        self.gate_scale, self.out_scale = gate_scale, out_scale
        self.epilogue = epilogue
        if epilogue and not (activation == "silu" and gated and not bias and gate_scale == 1 and not adapter_rank):
            rule = "is there for SwiGLU without biases, gate factor and adapters; use false"
            raise ConfigError(f"model.mlp_epilogue=true: {rule}")
        up = SwiGLULinear if epilogue else Linear
        self.up = fused(up(width, (1 + gated) * hidden, bias=bias), (1 + gated) * (hidden,))
        self.adapter = Adapters(width, [self.up.out_features], adapter_rank) if adapter_rank else None
        if self.adapter is not None:
            self.adapter.get_submodule("0.1").tensor_parts = self.up.tensor_parts
        self.out = RowLinear(hidden, width, tensor, bias=bias)

    @property
    def last(self) -> Tensor:
        """What writes to the residual stream."""
        return self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tensor.enter(x)
        if self.epilogue:
            x = self.out(self.up(x))
        else:
            up = self.up(x) if self.adapter is None else self.up(x) + self.adapter(x)
            between = partial(activated, activation=self.activation, gated=self.gated, gate_scale=self.gate_scale)
            x = between(up)
            with made_again(x, between, up, self.out.weight) if self.gated else nullcontext():
                x = self.out(x)
        return x if self.out_scale == 1 else x * self.out_scale

    def flops(self, tokens: int) -> int:
        """Forward pass: those of the matrix products."""
        return 2 * tokens * sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)


def activated(up: Tensor, activation: Activation, gated: bool, gate_scale: float = 1.0) -> Tensor:
    """`f(gate) * value` of `up: [...,2*hidden]`, or `f(up)` without a gate."""
    if activation == "silu" and gated and gate_scale == 1:
        return swiglu(up.unflatten(-1, (2, -1)))
    f = ACTIVATIONS[activation]
    if not gated:
        return f(up)
    gate, value = up.chunk(2, -1)
    return f(gate if gate_scale == 1 else gate * gate_scale) * value


class MoE(nn.Module):
    """Each token is worked on by `chosen` of `experts` MLPs, weighed by a router, and by a shared one if there is any.

    No token is dropped. The experts' matrices are one parameter each, `[experts, out, in]`.
    `latent`: width of the space the experts work in, by a projection before and after them; 0: the model's own.
    `spike_rate`: where it is not 0, what enters the experts' matrices is turned into spikes (see `Spikes`).
    `tensor`: ranks over which each expert's hidden channels are divided.
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
        spike_rate: float = 0.0,
        tensor: TensorParallel = ALONE,
    ):
        """`hidden`, `shared`: hidden channels of each expert and of the shared one. Raises `ConfigError`."""
        super().__init__()
        if chosen > experts:
            raise ConfigError(f"model.experts_per_token={chosen}: there are model.experts={experts}")
        if experts % router.groups or router.chosen_groups > router.groups:
            rule = f"must divide model.experts={experts}, and be model.router.chosen_groups={router.chosen_groups}"
            raise ConfigError(f"model.router.groups={router.groups}: {rule} or more")
        if not router.bias and router.bias_rate not in (AUTO, 0):
            raise ConfigError(
                f"model.router.bias_rate={router.bias_rate}: there is no bias; set model.router.bias=true"
            )
        self.experts, self.chosen, self.config, self.tensor = experts, chosen, router, tensor
        hidden = even_share(hidden, tensor, f"model.expert_width={hidden}")
        # Over whose ranks the experts are sharded; None: all are here.
        self.group: dist.ProcessGroup | None = None
        # Of the last forward pass in training, until it is taken.
        self.routed: Routed | None = None
        self.activation, self.gated = activation, gated
        inner = latent or width
        self.router = Linear(width, experts, bias=False)
        # Moved by rule and not by gradient.
        self.bias = nn.Parameter(torch.empty(experts), requires_grad=False) if router.bias else None
        self.enter = Linear(width, latent, bias=False) if latent else nn.Identity()
        self.spikes_in = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.spikes_within = Spikes(spike_rate, tensor) if spike_rate else nn.Identity()
        self.up = nn.Parameter(torch.empty(experts, (1 + gated) * hidden, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))
        self.tensor_parts = {"up": (1, (1 + gated) * (hidden,))}
        self.out = Linear(latent, width, bias=False) if latent else nn.Identity()
        self.shared = MLP(width, shared, activation=activation, gated=gated, tensor=tensor) if shared else None
        self.shared_gate = Linear(width, 1, bias=False) if shared and router.shared_gate else None
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {} if self.bias is None else {self.bias: constant(0.0)}

    def shard_experts(self, group: dist.ProcessGroup) -> list[nn.Parameter]:
        """Keeps this rank's experts of those that the ranks of `group` share; returns the parameters that shrink."""
        self.group = group
        for weight in (self.up, self.down):
            weight.data = local_experts(weight.data, group)
        return [self.up, self.down]

    @property
    def sends(self) -> bool:
        """Whether ranks exchange anything in it."""
        return self.group is not None

    @property
    def last(self) -> Tensor:
        """What writes to the residual stream."""
        return self.out.weight if isinstance(self.out, nn.Linear) else self.down

    def forward(self, x: Tensor) -> Tensor:
        """`[...,D]` -> the same."""
        rows = x.flatten(0, -2)
        weights, chosen, counts = self.route(rows)
        tensor = self.tensor
        worked = self.work(tensor.enter(self.spikes_in(self.enter(rows))), tensor.enter(weights), chosen, counts)
        y = self.out(tensor.leave(worked.to(x.dtype)))
        if self.shared is not None:
            shared = self.shared(rows)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(rows)) * shared)
        return y.view(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`rows: [n,D]` -> the weights of each one's experts, `[n,chosen]` in float32 at least, their numbers, and how
        many rows each expert has, int64 `[experts]`."""
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
        counts = _counts(chosen, self.experts)
        if self.training:
            self.routed = self._routed(logits, scores, counts)
        weights = scores.gather(1, chosen)
        if config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.scale, chosen, counts

    def _routed(self, logits: Tensor, scores: Tensor, counts: Tensor) -> Routed:
        config, zero = self.config, logits.new_zeros(())
        shares = scores if config.score == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Routed(
            counts,
            shares.sum(0) if config.balance else zero.expand(len(counts)),
            logits.logsumexp(-1).square().sum() if config.z_loss else zero,
        )

    def take_routed(self) -> Routed:
        """What the last forward pass did, which is then forgotten; the model must have been in training mode."""
        routed, self.routed = self.routed, None
        assert routed is not None
        return routed

    def work(self, rows: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """The weighted sum of what each row's experts make of it: rows `[n,D]`, brought to the experts sorted."""
        order = chosen.flatten().argsort(stable=True)
        token = order // self.chosen
        if self.group is None:
            made = self.run_experts(rows[token], counts)
        else:
            made = dispatch_and_combine(rows[token], counts, self.run_experts, group=self.group)
        weighted = made * weights.flatten()[order, None]
        return torch.zeros_like(rows, dtype=weighted.dtype).index_add(0, token, weighted)

    def run_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What this rank's experts make of `rows: [n,D]`, the next `counts[e]` of them for each."""
        if (room := _with_room(rows, counts)) is not None:
            place, counts = room
            filled = rows.new_zeros(int(counts.sum()), rows.shape[1]).index_copy(0, place, rows)
            return self.run_experts(filled, counts)[place]
        dtype = _grouped_dtype(rows, self.up, self.down)
        if dtype is not None:
            ends = counts.cumsum(0).to(torch.int32)
            up, down = (weight.to(dtype).transpose(1, 2) for weight in (self.up, self.down))
            inner = self._within(F.grouped_mm(rows.to(dtype), up, offs=ends))
            return F.grouped_mm(inner, down, offs=ends)
        # A rank without rows runs all on none, so that it has gradients as the others do.
        made = [
            F.linear(self._within(F.linear(part, up)), down)
            for part, up, down in zip(rows.split(counts.tolist()), self.up.unbind(), self.down.unbind(), strict=True)
            if len(part) or not len(rows)
        ]
        return torch.cat(made)

    def _within(self, up: Tensor) -> Tensor:
        """What enters the experts' last matrices."""
        within: Tensor = self.spikes_within(activated(up, self.activation, self.gated))
        return within

    def flops(self, tokens: int) -> int:
        """Forward pass: the matrix products of the router, the chosen experts and the shared one."""
        experts = self.chosen * (self.up[0].numel() + self.down[0].numel())
        others = sum(each.weight.numel() for each in self.modules() if isinstance(each, nn.Linear))
        return 2 * tokens * (experts + others)


def _grouped_dtype(rows: Tensor, up: Tensor, down: Tensor) -> torch.dtype | None:
    """In what torch's grouped product multiplies them; None where it can't, or isn't known to be faster.

    On one core, forward and backward, it took 9 to 65% less time than a product an expert (most for 256 experts of 32
    channels); padding each to as many rows took between 55% less and 28% more.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    known = {"cpu": torch.float32, "cuda": torch.bfloat16}
    if dtype != known.get(device) or is_fake(rows) or torch.compiler.is_compiling() or not len(rows):
        return None
    if device == "cuda" and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return None
    # Rows of every factor begin at multiples of 16 bytes.
    aligned = all(size * dtype.itemsize % 16 == 0 for size in (*up.shape[1:], *down.shape[1:]))
    return dtype if aligned and hasattr(F, "grouped_mm") else None


def _with_room(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where experts' rows lie once none has fewer than four, and how many each has; None where all have.

    Products of fewer rows are rounded otherwise on CPUs (MKL): others' choices would change what a token gets.
    """
    short = (counts > 0) & (counts < 4)
    if rows.device.type != "cpu" or is_fake(rows) or not short.any():
        return None
    added = (4 - counts).where(short, 0)
    return torch.arange(len(rows)) + (added.cumsum(0) - added).repeat_interleave(counts), counts + added


def _counts(chosen: Tensor, experts: int) -> Tensor:
    """How many rows each expert has. Of tensors without numbers, which planning runs: the same for all."""
    if chosen.is_meta or is_fake(chosen):
        whole, rest = divmod(chosen.numel(), experts)
        with unset_fake_temporarily():
            return torch.tensor([whole + (index < rest) for index in range(experts)], device="cpu")
    return torch.bincount(chosen.flatten(), minlength=experts)
