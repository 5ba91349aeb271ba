"""Step sizes and decay rates: their activation and initial values."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.layers.norms import upcast


def reset_step_bias(bias: Tensor, generator: torch.Generator | None, low: float = 1e-3, high: float = 1e-1) -> None:
    """Fills `bias` so that `softplus(bias)`, the step size of a zero input, is log-uniform in `[low, high]` (Mamba)."""
    with torch.no_grad():
        nn.init.uniform_(bias, math.log(low), math.log(high), generator=generator)
        # The inverse of softplus: log(exp(dt) - 1) = dt + log(1 - exp(-dt)).
        step = bias.exp()
        bias.copy_(step + (-torch.expm1(-step)).log())


def reset_decay_rate(rate_log: Tensor, generator: torch.Generator | None, low: float = 1.0, high: float = 16.0) -> None:
    """Fills `rate_log` with the logarithm of numbers uniform in `[low, high]`: the `A_log` of Mamba-2."""
    with torch.no_grad():
        nn.init.uniform_(rate_log, low, high, generator=generator)
        rate_log.log_()


def step_sizes(raw: Tensor, bias: Tensor) -> Tensor:
    """`softplus(raw + bias)`, in float32 at least."""
    return F.softplus(upcast(raw) + bias)


def log_forget(raw: Tensor, temperature: float = 1.0) -> Tensor:
    """`log(sigmoid(raw) ** (1 / temperature))`, in float32 at least: what a forget gate keeps, more if it is larger."""
    return F.logsigmoid(upcast(raw)) / temperature


def complement(log_decay: Tensor) -> Tensor:
    """`1 - exp(log_decay)`, what a gate that keeps `exp(log_decay)` takes in, without cancellation."""
    return -torch.expm1(log_decay)
