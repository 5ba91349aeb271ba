"""Optimizers by `optimizer.name`: how each is built, and what of its state a checkpoint holds.

A new one is its name and fields in `OptimizerConfig`, and an entry of `OPTIMIZERS`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimizerConfig:
    """The rule that turns gradients into new weights."""

    # The rule's name.
    name: Literal["adamw"] = "adamw"
    # Who computes it: torch.optim, or DeepSpeed's fused kernel (which needs a C++ compiler at the first start).
    implementation: Literal["torch", "deepspeed"] = "torch"
    # Highest learning rate, reached after the warm-up.
    lr: Annotated[float, Field(ge=0)] = 1e-3
    # Decay rates of the running means of gradient and squared gradient, a step.
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    # Added to the root of the squared gradient.
    eps: Annotated[float, Field(gt=0)] = 1e-8
    # Share of a weight taken off each step, times the learning rate; matrices only.
    weight_decay: Annotated[float, Field(ge=0)] = 0.1


@dataclass(frozen=True)
class Optimizer:
    """`options`: the fields of `OptimizerConfig` it is built with, besides the learning rate.

    `moments`: its float32 tensors of a weight's shape, by their key in its state. `implementations`: imports its class,
    by `optimizer.implementation`.
    """

    options: tuple[str, ...]
    moments: tuple[str, ...]
    implementations: Mapping[str, Callable[[], type[torch.optim.Optimizer]]]


def _fused_adam() -> type[torch.optim.Optimizer]:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam


OPTIMIZERS = {
    "adamw": Optimizer(
        options=("betas", "eps"),
        moments=("exp_avg", "exp_avg_sq"),
        implementations={"torch": lambda: torch.optim.AdamW, "deepspeed": _fused_adam},
    ),
}


class FiniteStep:
    """Mixed into an optimizer for ZeRO stage 0: clips, and leaves everything alone when a gradient isn't finite.

    ZeRO's own optimizers do both; the plain optimizer that DeepSpeed runs in stage 0 does neither in float32. The two
    public attributes are those the engine reads from ZeRO's optimizers.
    """

    param_groups: list[dict[str, Any]]
    # Largest norm of the gradient; 0 doesn't clip.
    clipping = 0.0
    # Ranks among which sharded experts, the groups called `moe`, are all there are; None for none.
    experts: dist.ProcessGroup | None = None
    # Whether the last step was left out.
    overflow = False
    # Norm of the last gradient, before clipping.
    _global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in weights])
        if self.experts is not None:
            norm = self._norm_with_dealt(self.experts)
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.clipping:
            nn.utils.clip_grads_with_norm_(weights, self.clipping, norm)
        super().step()  # type: ignore[misc]

    def _norm_with_dealt(self, experts: dist.ProcessGroup) -> Tensor:
        """The gradient's norm where some weights are parts: theirs is summed over the ranks that have the others."""
        norms = [
            nn.utils.get_total_norm(
                [p.grad for group in self.param_groups if ("moe" in group) == sharded for p in group["params"]]
            )
            for sharded in (False, True)
        ]
        dist.all_reduce(square := norms[1].square(), group=experts)
        return (norms[0].square() + square).sqrt()


def build_optimizer(
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    *,
    finite: bool,
    clipping: float,
    experts: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of `groups`, as `parameter_groups` makes them; `finite`: as a `FiniteStep` that clips.

    `experts`: see `FiniteStep`.
    """
    optimizer = OPTIMIZERS[config.name]
    cls = optimizer.implementations[config.implementation]()
    if finite:
        cls = type(f"Finite{cls.__name__}", (FiniteStep, cls), {"clipping": clipping, "experts": experts})
    options: dict[str, Any] = {name: vars(config)[name] for name in optimizer.options}
    return cls(groups, lr=config.lr, **options)  # type: ignore[call-arg]


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, *, rate: float = 1.0
) -> list[dict[str, Any]]:
    """Those that are trained as two groups: matrices decay; vectors and scalars (norms, gates, biases) do not.

    `rate`: a factor on the run's learning rate.
    """
    weights = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": weight_decay, "rate": rate},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0, "rate": rate},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Sets the run's learning rate, of which each group has its own factor."""
    for group in groups:
        group["lr"] = rate * group["rate"]
