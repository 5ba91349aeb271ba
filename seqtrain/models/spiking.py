"""Activations as counts of spikes (SpikingBrain, 2025, arXiv 2509.05276): small integers, many of them 0."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.layers import upcast
from seqtrain.parallel.tensor import ALONE, TensorParallel


def spike_counts(x: Tensor, rate: float, tensor: TensorParallel = ALONE) -> tuple[Tensor, Tensor]:
    """Integers `round(x / threshold)`, and the threshold `mean |x| / rate` of each token: `[...,D]` and `[...,1]`.

    The threshold follows the activations, so that neither all neurons fall silent nor all fire. Negative counts are
    inhibitory spikes. In float32 at least. `tensor`: ranks that have parts of a token's channels.
    """
    x = upcast(x)
    threshold = tensor.leave(x.abs().mean(-1, keepdim=True)) / tensor.count / rate
    # A token of zeros has no threshold, and no spikes.
    counts = torch.where(threshold > 0, x / threshold, 0).round()
    return counts, threshold


class Spikes(nn.Module):
    """`[...,D]` -> spike counts times their threshold, in x's dtype; the gradient passes as if nothing were rounded.

    In evaluation mode it counts values, zeros and spikes; `spike_statistics` reads the counts.
    """

    values: Tensor
    zeros: Tensor
    spikes: Tensor

    def __init__(self, rate: float, tensor: TensorParallel = ALONE):
        """`rate`: mean number of spikes per value, before rounding; a larger one is closer to x and less sparse.

        `tensor`: ranks that have parts of a token's channels.
        """
        super().__init__()
        self.rate, self.tensor = rate, tensor
        for name in ("values", "zeros", "spikes"):
            self.register_buffer(name, torch.empty((), dtype=torch.int64), persistent=False)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return dict.fromkeys((self.values, self.zeros, self.spikes), constant(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            counts, threshold = spike_counts(x, self.rate, self.tensor)
            if not self.training:
                self.values += counts.numel()
                self.zeros += (counts == 0).sum()
                self.spikes += counts.abs().sum().to(torch.int64)
            spiking = (counts * threshold).to(x.dtype)
        # The second term is zero, with the gradient of x.
        return spiking + (x - x.detach())


@dataclass(frozen=True)
class SpikeStatistics:
    """`sparsity`: share of values that are 0. `spikes`: mean count per value. `values`: how many there were."""

    sparsity: float
    spikes: float
    values: int


def spike_statistics(model: nn.Module, *, reset: bool = False) -> SpikeStatistics | None:
    """What all `Spikes` in `model` counted in evaluation mode; None where there are none, or nothing was counted.

    `reset`: counting starts again.
    """
    modules = [module for module in model.modules() if isinstance(module, Spikes)]
    values, zeros, spikes = (
        sum(int(count) for count in counts)
        for counts in ([m.values for m in modules], [m.zeros for m in modules], [m.spikes for m in modules])
    )
    if reset:
        for module in modules:
            for count in (module.values, module.zeros, module.spikes):
                count.zero_()
    return SpikeStatistics(zeros / values, spikes / values, values) if values else None
