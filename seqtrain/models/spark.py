"""An MLP that keeps few of its hidden channels, and knows which before it makes them (Spark, arXiv 2506.06644)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.kernels import sparse_mlp
from seqtrain.layers import Linear, upcast
from seqtrain.mixers.common.base import even_share
from seqtrain.models.feed_forward import ACTIVATIONS, Activation
from seqtrain.parallel.tensor import ALONE, TensorParallel


@dataclass(frozen=True)
class SparkConfig:
    """The keys under `model.spark.`: what layers have that `model.mlps` calls spark."""

    # Share of the hidden channels that are kept.
    share: Annotated[float, Field(gt=0, lt=1)] = 0.08
    # First channels of the residual stream, of which the predictor of the kept ones is made; 0: half of them.
    channels: Annotated[int, Field(ge=0)] = 0
    # Where the threshold lies. statistical: where the share of a normal distribution of the scores' mean and deviation
    # lies above it; exact: below the scores that are kept, which have to be sorted out.
    selection: Literal["statistical", "exact"] = "statistical"


class SparkMLP(nn.Module):
    """`D^T (f(max(s - t, 0)) * V x[r:])`, scores `s = P x[:r]`, and t so that a share of the channels is above it.

    The scores are all that is made of channels that are not kept. With half as many hidden channels again as a gated
    MLP it has as many weights.
    """

    # Whether ranks exchange anything in it.
    sends: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        hidden: int,
        config: SparkConfig,
        *,
        activation: Activation = "silu",
        tensor: TensorParallel = ALONE,
    ):
        """`hidden`: channels. `tensor`: ranks over which these are divided. Raises `ConfigError`."""
        super().__init__()
        self.channels = config.channels or width // 2
        if self.channels >= width:
            raise ConfigError(f"model.spark.channels={self.channels}: must be below model.width={width}")
        if config.selection == "exact" and tensor.count > 1:
            raise ConfigError("model.spark.selection=exact: sorts scores that ranks divide; use statistical")
        self.config, self.activation, self.tensor, self.hidden = config, activation, tensor, hidden
        own = even_share(hidden, tensor, f"model.spark: {hidden} hidden channels")
        self.predict = Linear(self.channels, own, bias=False)
        # A hidden channel's weights are rows, which a kernel that skips channels reads.
        self.value = nn.Parameter(torch.empty(own, width - self.channels))
        self.down = nn.Parameter(torch.empty(own, width))

    @property
    def last(self) -> Tensor:
        """What writes to the residual stream."""
        return self.down

    def forward(self, x: Tensor) -> Tensor:
        """`[...,D]` -> the same."""
        x = self.tensor.enter(x)
        gate = self.gate(x).to(x.dtype)
        return self.tensor.leave(sparse_mlp(gate, x[..., self.channels :], self.value, self.down)).to(x.dtype)

    def gate(self, x: Tensor) -> Tensor:
        """What weighs the hidden channels, `[...,F]` in float32 at least: zero for those that are not kept."""
        scores = upcast(self.predict(x[..., : self.channels]))
        above = F.relu(scores - threshold(scores, self.config, self.hidden, self.tensor))
        return ACTIVATIONS[self.activation](above)

    def flops(self, tokens: int) -> int:
        """Forward pass: the matrix products, of all channels."""
        return 2 * tokens * sum(weight.numel() for weight in self.parameters())


def threshold(scores: Tensor, config: SparkConfig, hidden: int, tensor: TensorParallel = ALONE) -> Tensor:
    """Above which a share of each token's `hidden` scores lies, `[...,F]` on this rank -> `[...,1]`."""
    if config.selection == "exact":
        return scores.topk(max(1, round(config.share * hidden)) + 1, -1).values[..., -1:]
    mean = tensor.total(scores.sum(-1, keepdim=True)) / hidden
    variance = tensor.total((scores - mean).square().sum(-1, keepdim=True)) / (hidden - 1)
    return mean + variance.sqrt() * _quantile(1 - config.share)


def _quantile(share: float) -> float:
    """Below which a share of normal numbers lies."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64, device="cpu")))


def spark_mlp(config: Any, tensor: TensorParallel) -> SparkMLP:
    """That of a `ModelConfig`. Raises `ConfigError`."""
    if config.spike_rate:
        raise ConfigError(
            "model.mlps: spark keeps channels by scores, which spikes would round; use model.spike_rate=0"
        )
    hidden = max(8, round(1.5 * config.hidden / 8) * 8)
    return SparkMLP(config.width, hidden, config.spark, activation=config.activation, tensor=tensor)
