"""Rules that make an update of a whole matrix, as optimizers of one: torch's, pytorch-optimizer's, ISTA's, own ones.

Each is given a weight and `OptimizerConfig`, and updates the weight in place, of which only the change is used. Updates
have about the size of AdamW's, so that its learning rates serve all: 0.2 root mean square for muon and aro.
"""

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from seqtrain.runtime.optimizers import OptimizerConfig

# Root mean square of an update over the learning rate: about that of AdamW's (Liu et al. 2025, arXiv 2502.16982).
UPDATE_SIZE = 0.2
# Alternations of a Sinkhorn normalization, as in arXiv 2502.06742.
SINKHORN_STEPS = 5


@dataclass(frozen=True)
class Rule:
    """How the optimizer of one matrix is made. `tall`: it is given a matrix with at least as many rows as columns."""

    make: Callable[[nn.Parameter, "OptimizerConfig"], torch.optim.Optimizer]
    tall: bool = False


def muon(weight: nn.Parameter, config: "OptimizerConfig") -> torch.optim.Optimizer:
    """Momentum, orthogonalized by five Newton-Schulz iterations (Jordan 2024), in bfloat16 as torch has it."""
    if config.dtype == "float32":
        return Float32Muon([weight], {"lr": config.lr, "momentum": config.momentum})
    size = "match_rms_adamw"
    return torch.optim.Muon([weight], lr=config.lr, momentum=config.momentum, weight_decay=0.0, adjust_lr_fn=size)


class Float32Muon(torch.optim.Optimizer):
    """torch.optim.Muon with its products in the gradient's own format, where torch rounds to bfloat16."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(mean, group["momentum"])
                update = orthogonalized(update)
                weight.add_(update, alpha=-group["lr"] * UPDATE_SIZE * max(update.shape) ** 0.5)


def orthogonalized(matrix: Tensor) -> Tensor:
    """`X <- a X + b (X X^T) X + c (X X^T)^2 X`, from `matrix / |matrix|`: singular values are brought near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def soap(weight: nn.Parameter, config: "OptimizerConfig") -> torch.optim.Optimizer:
    """Adam in the eigenbases of Shampoo's preconditioners (Vyas et al. 2024, arXiv 2409.11321)."""
    from pytorch_optimizer import SOAP

    return SOAP(
        [weight],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=0.0,
        precondition_frequency=config.precondition_every,
        max_precondition_dim=config.precondition_up_to,
    )


def adamw(weight: nn.Parameter, config: "OptimizerConfig") -> torch.optim.Optimizer:
    """For the rows among matrices that are none."""
    return torch.optim.AdamW([weight], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)


def aro(weight: nn.Parameter, config: "OptimizerConfig") -> torch.optim.Optimizer:
    """See `ARO`."""
    return ARO([weight], {"lr": config.lr, "momentum": config.momentum})


class ARO(torch.optim.Optimizer):
    """Adaptively Rotated Optimization (Gong et al. 2026, arXiv 2602.09006) with SinkGD's f (arXiv 2502.06742).

    `M <- EMA(G)`, `R <- QR(M f(R^T M)^T)`, `W <- W - 0.2 lr R f(R^T M)`: descent in the norm of `f` after a rotation
    that makes it steep, R `[m,m]` with m the smaller side.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                rows, columns = weight.shape
                state, gradient = self.state[weight], weight.grad if rows <= columns else weight.grad.T
                if not state:
                    state["exp_avg"] = torch.zeros_like(gradient)
                    state["rotation"] = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
                mean, rotation = state["exp_avg"], state["rotation"]
                mean.lerp_(gradient, 1 - group["momentum"])
                rotation.copy_(torch.linalg.qr(mean @ sinkhorn(rotation.T @ mean).T).Q)
                update = rotation @ sinkhorn(rotation.T @ mean)
                weight.add_(update if rows <= columns else update.T, alpha=-UPDATE_SIZE * group["lr"])


def sinkhorn(matrix: Tensor) -> Tensor:
    """`matrix: [m,n]` with rows, then columns, brought to root mean square 1, again and again."""
    for _ in range(SINKHORN_STEPS):
        for dim in (1, 0):
            matrix = matrix / matrix.square().mean(dim, keepdim=True).sqrt().clamp(min=1e-12)
    return matrix


def dct_adamw(weight: nn.Parameter, config: "OptimizerConfig") -> torch.optim.Optimizer:
    """AdamW of the gradient's `rank` largest columns after a cosine transform (Modoranu et al., arXiv 2505.17967)."""
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "rotate_subspace": True}
    return dct_class()([weight], lr=config.lr, weight_decay=0.0, rank=config.rank, proj="dct", **options)


@cache
def dct_class() -> Any:
    """ISTA's DCTAdamW, which is plain PyTorch, without the rest of its package, which needs CUDA to be imported.

    Matrices of one size have one cosine transform. In 1.1.15 moments are rotated into their own memory, which reads
    what it has overwritten: that is mended.
    """
    name = "ista_daslab_optimizers"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or ())
    from ista_daslab_optimizers.fft_low_rank.dct_adamw import DCTAdamW, FFTLowRankProjector

    def rotate(projector: Any, rotation: Tensor, moment: Tensor) -> None:
        moment.copy_(moment @ rotation if projector.is_right_proj else rotation @ moment)

    FFTLowRankProjector.rotate_subspace = rotate

    class SharedTransform(DCTAdamW):
        made: ClassVar[dict[tuple[Any, ...], Tensor]] = {}

        def setup_Q(self, p: Tensor) -> None:
            key = min(p.shape), p.dtype, p.device
            if key not in self.made:
                super().setup_Q(p)
                self.made[key] = vars(self)["Q"]
            self.Q = self.made[key]

    return SharedTransform


class MatrixOptimizer:
    """The optimizer of one matrix, which lives where the matrix is updated; `change` and its state are all there is.

    The weight itself isn't here: an optimizer that decays nothing makes the same change to zeros.
    """

    def __init__(self, rule: Rule, rows: int, columns: int, config: "OptimizerConfig"):
        self._turned = rule.tall and rows < columns
        self.shape = rows, columns
        self._weight = nn.Parameter(torch.empty(0, 0))
        self._optimizer = rule.make(self._weight, replace(config, rank=min(config.rank, rows, columns)))

    def change(self, gradient: Tensor, rate: float) -> Tensor:
        """What to add to the weight, `[rows,columns]` as `gradient` is."""
        gradient = gradient.T.contiguous() if self._turned else gradient
        weight, optimizer = self._weight, self._optimizer
        weight.data, weight.grad = torch.zeros_like(gradient), gradient
        optimizer.param_groups[0]["lr"] = rate
        with redirect_stdout(io.StringIO()):  # DCTAdamW tells what it makes.
            optimizer.step()
        change = weight.data
        weight.data, weight.grad = change.new_empty(0, 0), None
        return change.T if self._turned else change

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by where they are in its state."""
        return dict(_tensors(self._optimizer.state[self._weight]))

    def restore(self, state: Mapping[str, Tensor], *, steps_taken: int, device: torch.device) -> None:
        """Gives the optimizer what `state` gave after so many steps."""
        # Its own first step makes the tensors, whatever they are.
        self.change(torch.zeros(self.shape, device=device), 0.0)
        own = self.state()
        for name in own:
            own[name].copy_(state[name])
        for counters in (self._optimizer.param_groups[0], vars(self._optimizer)):
            for name in {"step", "steps"} & counters.keys():
                counters[name] = steps_taken


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Those in `value` and what it is made of: dictionaries, lists, objects."""
    if isinstance(value, Tensor):
        yield path, value
        return
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if type(value).__module__.startswith("ista_daslab_optimizers"):
        items = vars(value).items()
    for name, item in items:
        yield from _tensors(item, f"{path}.{name}" if path else str(name))


ADAMW = Rule(adamw)
RULES = {"muon": Rule(muon), "soap": Rule(soap), "aro": Rule(aro), "dct_adamw": Rule(dct_adamw, tall=True)}
