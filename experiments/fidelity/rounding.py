"""TurboQuant's distortion on states of a recurrence, and what spikes and Spark's threshold leave (three papers)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.models.spiking import spike_counts
from seqtrain.models.turboquant import TurboQuant

# Bits of a number: the paper's distortion, and how far from it counts as the same.
DISTORTION = {2: 0.117, 3: 0.03, 4: 0.009}
# The same of inner products' squared errors times the width, where one bit makes them unbiased.
PRODUCTS = {2: 0.56, 3: 0.18, 4: 0.047}
WIDTH, HEADS, TOKENS, NEAR = 256, 2, 64, 1.25
KEPT, HIDDEN, TOKENS_OF_FFN = (0.08, 0.25), 2048, 256


def measure(effort: Effort) -> Iterator[Figure]:
    """Relative squared errors of rotated and rounded state rows; shares that thresholds keep."""
    states = [_states(seed) for seed in effort.seeds]
    errors = {bits: tuple(_distortion(x, bits) for x in states) for bits in DISTORTION}
    plain = {bits: tuple(_error(_rounded_to_the_largest(x, bits), x) for x in states) for bits in DISTORTION}
    bits = tuple(float(each) for each in DISTORTION)
    curves = tuple(
        Curve(name, bits, tuple(found[each][0] for each in DISTORTION))
        for name, found in (
            ("rotation and codebook", errors),
            ("rounding to the largest", plain),
            ("the paper's bound", {each: (math.sqrt(3) * math.pi / 2 * 4.0**-each,) for each in DISTORTION}),
            ("no method is below", {each: (4.0**-each,) for each in DISTORTION}),
        )
    )
    for each, published in DISTORTION.items():
        bounds = Bounds(published / NEAR, published * NEAR)
        yield Figure(f"relative distortion at {each} bits", errors[each], bounds, curves=curves if each == 2 else ())
    for each, published in PRODUCTS.items():
        found, slopes = zip(*(_products(each, seed) for seed in effort.seeds), strict=True)
        yield Figure(
            f"error of inner products times the width at {each} bits", found, Bounds(published / NEAR, published * NEAR)
        )
        yield Figure(f"... rounded over true at {each} bits", slopes, Bounds(0.98, 1.02))
    for share in KEPT:
        kept = tuple(_kept_share(share, seed) for seed in effort.seeds)
        yield Figure(f"share kept by the statistical top-k, asked {share:g}", kept, Bounds(share - 0.01, share + 0.01))
    seven, spikes = zip(*(_spikes(seed) for seed in effort.seeds), strict=True)
    yield Figure("share of spike counts up to 7 at k = 3", seven, Bounds(at_least=0.94))
    yield Figure("bits set in a count at k = 3", spikes, Bounds(1.0, 1.5))


def _distortion(x: Tensor, bits: int) -> float:
    """Mean relative squared error of rows."""
    quantizer = TurboQuant(x.shape[-1], bits)
    return _error(quantizer.unpack(quantizer.pack(x)), x)


def _rounded_to_the_largest(x: Tensor, bits: int) -> Tensor:
    """Each row's numbers in equal steps up to its largest one."""
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return ((x / step - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step


def _error(rounded: Tensor, x: Tensor) -> float:
    return ((rounded - x).square().sum(-1) / x.square().sum(-1)).mean().item()


def _states(seed: int) -> Tensor:
    """Rows of a Gated DeltaNet layer's state, `[n,V]`."""
    torch.manual_seed(seed)
    cls = MIXERS.get("gated_delta_net")
    with torch.no_grad():
        _, state = cls(cls.Config(), LayerShape(WIDTH, HEADS))(torch.randn(4, TOKENS, WIDTH))
    # Of unit length, so that no row counts more than another.
    return torch.nn.functional.normalize(state["memory"].flatten(0, 2), dim=-1)


def _products(bits: int, seed: int) -> tuple[float, float]:
    """Of inner products with rounded rows: the squared error times the width, and the slope of rounded over true."""
    rows = _states(seed)
    quantizer = TurboQuant(rows.shape[-1], bits, unbiased=True)
    rounded = quantizer.unpack(quantizer.pack(rows))
    generator = torch.Generator().manual_seed(seed)
    # Queries that agree with their rows a bit, as keys' do.
    asked = torch.nn.functional.normalize(rows + torch.randn(rows.shape, generator=generator) / 8, dim=-1)
    true, came = (asked * rows).sum(-1), (asked * rounded).sum(-1)
    error = (asked * (rounded - rows)).sum(-1).square().mean() * rows.shape[-1]
    return error.item(), (came.sum() / true.sum()).item()


def _kept_share(share: float, seed: int) -> float:
    """Of normal activations above `mean + deviation * quantile(1 - share)`, each token's own."""
    x = torch.randn(TOKENS_OF_FFN, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * share, dtype=torch.float64))
    threshold = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) * quantile
    return (x > threshold).double().mean().item()


def _spikes(seed: int) -> tuple[float, float]:
    x = torch.randn(TOKENS_OF_FFN, HIDDEN, generator=torch.Generator().manual_seed(seed))
    counts = spike_counts(x, 3.0)[0].abs().to(torch.int64)
    ones = sum((counts >> place) & 1 for place in range(8))
    return (counts <= 7).double().mean().item(), ones.double().mean().item()


ROW = Row(
    name="rounding",
    claim="TurboQuant rounds at a distortion of 0.117, 0.03 and 0.009 at 2, 3 and 4 bits, inner products at 0.56, 0.18 "
    "and 0.047 over the width and without bias (arXiv 2504.19874); "
    "Spark's statistical top-k keeps the share it is asked for (arXiv 2506.06644); SpikingBrain's counts "
    "at k = 3 fit into three bits for 94.1% and set 1.13 bits a value (arXiv 2509.05276)",
    method="the library's rounding of state rows of a Gated DeltaNet layer, of unit length, within a quarter of the "
    "paper's, inner products with queries that agree with their rows; thresholds and counts on normal activations, "
    "where the papers have a model's own",
    axes=Axes("bits a number", "relative squared error", log_y=True),
    measure=measure,
    sources=("2504.19874", "2506.06644", "2509.05276"),
)
