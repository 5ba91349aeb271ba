"""Activations as spikes (SpikingBrain, 2025, arXiv 2509.05276, section 3.3): small integers, sent as trains of spikes.

What enters a linear projection is divided by a threshold that follows it and rounded to a count. A count is what a GPU
multiplies with; event-driven hardware expands it to a train of spikes, of which a projection only adds weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from seqtrain.initialization import Initializer, constant, initialize
from seqtrain.layers import upcast
from seqtrain.parallel.tensor import ALONE, RowLinear, TensorParallel

# How a count becomes a train. binary: a spike a step, so many in all. ternary: the same with inhibitory spikes, -1, for
# negative counts. bitwise: a step a bit of the size, all spikes with the count's sign. complement: a step a bit of
# two's complement, whose first spike counts negatively.
Code = Literal["binary", "ternary", "bitwise", "complement"]
# Steps of the window over which the report counts empty places: counts up to 7 fit in.
WINDOW = 3


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


def spike_train(counts: Tensor, code: Code, steps: int = 0) -> Tensor:
    """Whole numbers `counts: [...]` as spikes, int8 `[steps,...]` of -1, 0 and 1; `counts_of` is the inverse.

    `steps`: of the train; 0: as many as the largest count needs. Bits come first to last from the most significant one.
    Raises `ValueError` where a count doesn't fit.
    """
    whole = counts.to(torch.int64)
    if not torch.equal(whole.to(counts.dtype), counts):
        raise ValueError("spike_train: counts has fractions, expected whole numbers")
    low, high = (int(whole.min()), int(whole.max())) if whole.numel() else (0, 0)
    needed = _steps(low, high, code)
    steps = steps or needed
    if steps < needed:
        raise ValueError(f"spike_train: steps={steps}, but counts from {low} to {high} need {needed} in code={code}")
    place = torch.arange(steps, device=counts.device).view(-1, *[1] * counts.dim())
    if code in ("binary", "ternary"):
        return ((place < whole.abs()) * whole.sign()).to(torch.int8)
    # Python's and PyTorch's shifts of negative numbers give bits of two's complement.
    bits = ((whole if code == "complement" else whole.abs()) >> (steps - 1 - place)) & 1
    return (bits if code == "complement" else bits * whole.sign()).to(torch.int8)


def counts_of(train: Tensor, code: Code) -> Tensor:
    """The counts, int64 `[...]`, whose spikes are `train: [steps,...]`."""
    return torch.einsum("s,s...->...", step_weights(len(train), code).to(train.device), train.to(torch.int64))


def step_weights(steps: int, code: Code) -> Tensor:
    """What a spike of each step counts, int64 `[steps]`: a projection is `threshold * sum_s weight_s W train_s`."""
    if code in ("binary", "ternary"):
        return torch.ones(steps, dtype=torch.int64)
    weights = 2 ** torch.arange(steps - 1, -1, -1)
    return weights * torch.where(torch.arange(steps) == 0, -1, 1) if code == "complement" else weights


def _steps(low: int, high: int, code: Code) -> int:
    """The fewest steps of a train of counts from `low` to `high`; one at least. Raises `ValueError`."""
    if code not in get_args(Code):
        raise ValueError(f"spike_train: code={code}, expected one of {', '.join(get_args(Code))}")
    if code == "binary" and low < 0:
        raise ValueError(f"spike_train: code=binary has no inhibitory spikes for a count of {low}; use code=ternary")
    if code == "complement":
        return 1 + max(high.bit_length(), (-1 - low).bit_length() if low < 0 else 0)
    largest = max(-low, high)
    return max(1, largest.bit_length() if code == "bitwise" else largest)


class Spikes(nn.Module):
    """`[...,D]` -> spike counts times their threshold, in x's dtype; the gradient passes as if nothing were rounded.

    Within `counting_spikes` it counts; `spike_statistics` reads that.
    """

    # Values; those that are 0; spikes of their bitwise trains; values that fit into `WINDOW` steps, and their spikes.
    counted: Tensor

    def __init__(self, rate: float, tensor: TensorParallel = ALONE):
        """`rate`: mean number of spikes per value, before rounding; a larger one is closer to x and less sparse.

        `tensor`: ranks that have parts of a token's channels.
        """
        super().__init__()
        self.rate, self.tensor, self.counting = rate, tensor, False
        self.register_buffer("counted", torch.empty(5, dtype=torch.int64), persistent=False)
        initialize(self)

    def initializers(self) -> dict[Tensor, Initializer]:
        return {self.counted: constant(0)}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            counts, threshold = spike_counts(x, self.rate, self.tensor)
            if self.counting:
                self.counted += statistics_of(counts)
            spiking = (counts * threshold).to(x.dtype)
        # The second term is zero, with the gradient of x.
        return spiking + (x - x.detach())


def statistics_of(counts: Tensor) -> Tensor:
    """What `Spikes.counted` adds up, int64 `[5]`."""
    size = counts.abs().flatten().to(torch.int32)
    # Nearly all counts are small: how many there are of each is found in one pass.
    number = torch.arange(256, device=size.device)
    many = torch.bincount(size.clamp(max=256), minlength=257)[:256]
    spikes, fits = many * _bits(number), number < 2**WINDOW
    large = _bits(size[size > 255].to(torch.int64)).sum()
    return torch.stack(
        [many.new_tensor(size.numel()), many[0], spikes.sum() + large, many[fits].sum(), spikes[fits].sum()]
    )


def _bits(number: Tensor) -> Tensor:
    """How many bits are set in int64 numbers below 2^32: of pairs, of fours, of bytes, of all."""
    ones = number - ((number >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    return (((ones + (ones >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24) & 0xFF


@dataclass(frozen=True)
class SpikeStatistics:
    """The four figures of the report's section 5.5, and how many values they are of.

    `silent`: share of values without a spike (18.4% in the report). `spikes`: mean spikes a value, in bitwise trains
    (1.13). `within`: share of values that fit into a window of three steps, counts up to 7 (94.1%). `sparsity`: share
    of places in these windows that are empty (69.15%).
    """

    silent: float
    spikes: float
    within: float
    sparsity: float
    values: int

    @classmethod
    def of(cls, counted: Tensor) -> "SpikeStatistics":
        """Of what `statistics_of` gave, summed."""
        values, silent, spikes, within, within_spikes = map(int, counted)
        empty = 1 - within_spikes / (WINDOW * within) if within else 1.0
        return cls(silent / values, spikes / values, within / values, empty, values)


@contextmanager
def counting_spikes(model: nn.Module) -> Iterator[None]:
    """All `Spikes` in `model` count, from nothing on."""
    modules = [module for module in model.modules() if isinstance(module, Spikes)]
    for module in modules:
        module.counted.zero_()
        module.counting = True
    try:
        yield
    finally:
        for module in modules:
            module.counting = False


def spikes_counted(model: nn.Module) -> Tensor:
    """The sum of `Spikes.counted` over `model`, int64 `[5]` on the CPU; zeros without any."""
    counted = [module.counted.cpu() for module in model.modules() if isinstance(module, Spikes)]
    return torch.stack(counted).sum(0) if counted else torch.zeros(5, dtype=torch.int64)


def spike_statistics(model: nn.Module) -> SpikeStatistics | None:
    """Of all that `model` counted in the last `counting_spikes`; None where nothing was."""
    counted = spikes_counted(model)
    return SpikeStatistics.of(counted) if counted[0] else None


def spike_inputs(module: nn.Module, rate: float) -> None:
    """What enters every linear projection in `module` is turned into spikes from now on, as `Spikes` says.

    Those have it as a part named `spikes`, which a hook calls; again, it changes the rate. Routers, whose choice is of
    scores and not of their projection, stay as they are, and so do experts' matrices, which are no `nn.Linear`: see
    `MoE`.
    """
    for each in module.modules():
        if isinstance(each, nn.Linear):
            spikes: Any = getattr(each, "spikes", None)
            if spikes is None:
                each.spikes = spikes = Spikes(rate, each.tensor if isinstance(each, RowLinear) else ALONE)
                each.register_forward_pre_hook(_enter)
            spikes.rate = rate


def _enter(linear: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    spikes: Any = linear.spikes
    return (spikes(arguments[0]), *arguments[1:])


def round_weights(weight: Tensor, *, bits: int = 8, group: int = 128) -> Tensor:
    """`weight: [...,in]` as integers of so many bits with one scale for each `group` numbers of a row, put back.

    Symmetric: the largest of a group is the largest integer (the report's INT8 of linear projections). The last group
    may be shorter.
    """
    highest = 2 ** (bits - 1) - 1
    rows = nn.functional.pad(upcast(weight), (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))
    scale = rows.abs().amax(-1, keepdim=True) / highest
    whole = torch.where(scale > 0, rows / scale, 0).round()
    return (whole * scale).flatten(-2)[..., : weight.shape[-1]].to(weight.dtype)
