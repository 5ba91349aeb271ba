"""Optimizers by `optimizer.name`: how each is built, and what of its state a checkpoint holds.

A new one is its name and fields in `OptimizerConfig`, and an entry of `OPTIMIZERS`.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.runtime.run_folder import plain

Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimizerConfig:
    """The rule that turns gradients into new weights."""

    # The rule's name. muon, soap, aro and dct_adamw are for matrices, and leave all else to adamw.
    name: Literal["adamw", "muon", "soap", "lion", "aro", "dct_adamw", "schedule_free"] = "adamw"
    # Who computes it: plain PyTorch, or for adamw DeepSpeed's fused kernel (which needs a C++ compiler at the first
    # start).
    implementation: Literal["torch", "deepspeed"] = "torch"
    # Highest learning rate, reached after the warm-up.
    lr: Annotated[float, Field(ge=0)] = 1e-3
    # Decay rates of the running means of gradient and squared gradient, a step. lion: of its update and its mean;
    # schedule_free: the first is the share of averaged weights in those that gradients are taken at.
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    # Added to the root of the squared gradient.
    eps: Annotated[float, Field(gt=0)] = 1e-8
    # Share of a weight taken off each step, times the learning rate; matrices only.
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    # muon, aro: decay rate of the running mean of a matrix's gradient, a step.
    momentum: Decay = 0.95
    # muon: number format of the products that orthogonalize.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # soap: steps between two changes of the bases.
    precondition_every: Annotated[int, Field(gt=0)] = 10
    # soap: sides of a matrix up to this size have a basis, two square matrices of that size.
    precondition_up_to: Annotated[int, Field(gt=0)] = 1024
    # dct_adamw: columns of a matrix's cosine transform that are kept.
    rank: Annotated[int, Field(gt=0)] = 128


@dataclass(frozen=True)
class Optimizer:
    """`options`: the fields of `OptimizerConfig` it is built with, besides the learning rate.

    `moments`: its float32 tensors of a weight's shape, by their key in its state. `implementations`: imports its class,
    by `optimizer.implementation`. `numbers`: what else of a group follows from the steps before. `averages`: whether
    the model is used with averages of the weights in training, as those of `ScheduleFreeAdamW`. `matrix_options`: the
    fields read by its rule for whole matrices, which `matrix_rules` has; None where there is none. `module`: what must
    be there; `package`: how pip brings it.
    """

    options: tuple[str, ...]
    moments: tuple[str, ...]
    implementations: Mapping[str, Callable[[], type[torch.optim.Optimizer]]]
    numbers: tuple[str, ...] = ()
    averages: bool = False
    matrix_options: tuple[str, ...] | None = None
    module: str = ""
    package: str = ""


def _fused_adam() -> type[torch.optim.Optimizer]:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam


def _lion() -> type[torch.optim.Optimizer]:
    from pytorch_optimizer import Lion

    return type("Lion", (StepOfSome, Lion), {})


def _schedule_free() -> type[torch.optim.Optimizer]:
    from pytorch_optimizer import ScheduleFreeAdamW

    return type("ScheduleFreeAdamW", (StepOfSome, ScheduleFreeAdamW), {})


def _whole_matrices() -> type[torch.optim.Optimizer]:
    from seqtrain.runtime.whole_matrices import WholeMatrices

    return WholeMatrices


def _of_matrices(*options: str, module: str = "", package: str = "") -> Optimizer:
    return Optimizer(
        options=("betas", "eps"),
        moments=("exp_avg", "exp_avg_sq"),
        implementations={"torch": _whole_matrices},
        matrix_options=options,
        module=module,
        package=package,
    )


FROM_PYTORCH_OPTIMIZER: dict[str, Any] = {"module": "pytorch_optimizer", "package": "'pytorch-optimizer>=4.1,<5'"}
OPTIMIZERS = {
    "adamw": Optimizer(
        options=("betas", "eps"),
        moments=("exp_avg", "exp_avg_sq"),
        implementations={"torch": lambda: torch.optim.AdamW, "deepspeed": _fused_adam},
    ),
    "muon": _of_matrices("momentum", "dtype", module="torch.optim._muon", package="'torch>=2.9'"),
    "soap": _of_matrices("precondition_every", "precondition_up_to", **FROM_PYTORCH_OPTIMIZER),
    "aro": _of_matrices("momentum"),
    # What the package depends on is for others of its optimizers, and needs CUDA's compiler.
    "dct_adamw": _of_matrices(
        "rank", module="ista_daslab_optimizers", package="--no-deps ista-daslab-optimizers==1.1.15"
    ),
    "lion": Optimizer(
        options=("betas",), moments=("exp_avg",), implementations={"torch": _lion}, **FROM_PYTORCH_OPTIMIZER
    ),
    "schedule_free": Optimizer(
        options=("betas", "eps"),
        moments=("z", "exp_avg_sq"),
        implementations={"torch": _schedule_free},
        numbers=("weight_sum", "lr_max"),
        averages=True,
        **FROM_PYTORCH_OPTIMIZER,
    ),
}


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises `ConfigError` where nobody can compute what is asked for."""
    optimizer = OPTIMIZERS[config.name]
    if config.implementation not in optimizer.implementations:
        came = f"optimizer.implementation={config.implementation}"
        raise ConfigError(f"{came}: has no {config.name}; use optimizer.implementation=torch")
    if optimizer.module and not importlib.util.find_spec(optimizer.module):
        raise ConfigError(f"optimizer.name={config.name}: needs another package: pip install {optimizer.package}")


def used_options(config: OptimizerConfig) -> dict[str, Any]:
    """The fields of `config` that its optimizer reads, as plain values."""
    optimizer = OPTIMIZERS[config.name]
    used = ("name", "implementation", "lr", "weight_decay", *optimizer.options, *(optimizer.matrix_options or ()))
    return {name: value for name, value in plain(config).items() if name in used}


class StepOfSome:
    """Mixed into an optimizer that counts the steps of its groups: those that are empty now have none.

    ZeRO 3 puts a group's weights in for the group's own step, and takes them out again.
    """

    param_groups: list[dict[str, Any]]

    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["params"]]
        super().step()  # type: ignore[misc]
        self.param_groups = groups


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
    # Ranks that have the other parts of weights marked `model_parallel`; None for none.
    tensor: dist.ProcessGroup | None = None
    # Whether the last step was left out.
    overflow = False
    # Norm of the last gradient, before clipping.
    _global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in weights])
        if self.experts is not None or self.tensor is not None:
            norm = self._norm_with_parts()
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.clipping:
            nn.utils.clip_grads_with_norm_(weights, self.clipping, norm)
        super().step()  # type: ignore[misc]

    def _norm_with_parts(self) -> Tensor:
        """The gradient's norm where some weights are parts: theirs is summed over the ranks that have the others."""
        found: dict[tuple[bool, bool], list[Tensor]] = {}
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    found.setdefault(("moe" in group, "model_parallel" in vars(weight)), []).append(weight.grad)
        total = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        # In the same order on every rank.
        for (dealt, divided), gradients in sorted(found.items(), key=lambda each: each[0]):
            square = nn.utils.get_total_norm(gradients).square()
            for part, ranks in ((dealt, self.experts), (divided, self.tensor)):
                if part and ranks is not None:
                    dist.all_reduce(square, group=ranks)
            total = total + square
        return total.sqrt()


def build_optimizer(
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    *,
    finite: bool,
    clipping: float,
    experts: dist.ProcessGroup | None = None,
    tensor: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of `groups`, as `parameter_groups` makes them; `finite`: as a `FiniteStep` that clips.

    `experts`, `tensor`: see `FiniteStep`.
    """
    optimizer = OPTIMIZERS[config.name]
    cls = optimizer.implementations[config.implementation]()
    if finite:
        told = {"clipping": clipping, "experts": experts, "tensor": tensor}
        cls = type(f"Finite{cls.__name__}", (FiniteStep, cls), told)
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
