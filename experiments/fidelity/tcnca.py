"""TCNCA's dilated convolutions against a convolution as long as the sequence, by FFT (arXiv 2312.05605)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from experiments.fidelity.timing import fastest
from seqtrain.kernels import short_convolution

LENGTHS = (4096, 16384, 65536, 131072)
WIDTH, TAPS, DEPTH, DILATION, REPEATS = 64, 5, 3, 4, 3


def measure(effort: Effort) -> Iterator[Figure]:
    """Seconds of the FFT over those of the convolutions, forward and with the backward pass."""
    lengths = [length for length in LENGTHS if length <= max(4096, LENGTHS[-1] * effort.scale)]
    ratios = [[_ratio(length, seed, False) for length in lengths] for seed in effort.seeds]
    yield Figure(
        "FFT over convolutions, forward, at the longest",
        tuple(row[-1] for row in ratios),
        Bounds(at_least=1.5),
        length=lengths[-1],
        curves=seed_curves("forward", effort.seeds, [float(length) for length in lengths], ratios),
    )
    both = tuple(_ratio(lengths[-1], seed, True) for seed in effort.seeds)
    yield Figure(
        "FFT over convolutions, forward and backward, at the longest", both, Bounds(at_least=1.2), length=lengths[-1]
    )


def _ratio(tokens: int, seed: int, backward: bool) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, WIDTH, generator=generator, requires_grad=backward)
    weights = torch.randn(DEPTH, WIDTH, TAPS, generator=generator, requires_grad=backward)
    kernel = torch.randn(tokens, WIDTH, generator=generator, requires_grad=backward)

    def convolutions() -> Tensor:
        out = x
        for layer in range(DEPTH):
            out = out + short_convolution(out, weights[layer], activation="silu", dilation=DILATION**layer)[0]
        return out

    def fourier() -> Tensor:
        size = 2 * tokens
        return torch.fft.irfft(torch.fft.rfft(x, size, 1) * torch.fft.rfft(kernel, size, 0), size, 1)[:, :tokens]

    return _seconds(fourier, backward) / _seconds(convolutions, backward)


def _seconds(function: Callable[[], Tensor], backward: bool) -> float:
    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = function()
        if backward:
            out.sum().backward()

    return fastest(run, REPEATS)


ROW = Row(
    name="tcnca",
    claim="a temporal convolution with dilation takes less time than an FFT of full length, at 131k tokens up to 7.1 "
    "times forward and 2.9 times with the backward pass (Terzic et al. 2023, arXiv 2312.05605)",
    method=f"{DEPTH} layers of {TAPS} taps, dilation {DILATION}, {WIDTH} channels, against one FFT convolution of full "
    f"length, on one thread; the fastest of {REPEATS}. The paper's figures are a GPU's; the bounds are ours",
    axes=Axes("tokens", "times as fast as the FFT", log_x=True),
    measure=measure,
    sources=("2312.05605",),
    timed=True,
)
