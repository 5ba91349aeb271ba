"""TurboQuant's distortion on states of a recurrence, and what spikes and Spark's threshold leave (three papers)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.models.spiking import spike_counts

# Bits of a number: the paper's distortion, and how far from it counts as the same.
DISTORTION = {2: 0.117, 3: 0.03, 4: 0.009}
WIDTH, HEADS, TOKENS, NEAR = 256, 2, 64, 1.25
KEPT, HIDDEN, TOKENS_OF_FFN = (0.08, 0.25), 2048, 256


def measure(effort: Effort) -> Iterator[Figure]:
    """Relative squared errors of rotated and rounded state rows; shares that thresholds keep."""
    errors = {bits: tuple(_distortion(bits, seed) for seed in effort.seeds) for bits in DISTORTION}
    plain = {bits: tuple(_distortion(bits, seed, rotated=False) for seed in effort.seeds) for bits in DISTORTION}
    bits = tuple(float(each) for each in DISTORTION)
    curves = tuple(
        Curve(name, bits, tuple(found[each][0] for each in DISTORTION))
        for name, found in (("rotation and codebook", errors), ("rounding to the largest", plain))
    )
    for each, published in DISTORTION.items():
        bounds = Bounds(published / NEAR, published * NEAR)
        yield Figure(f"relative distortion at {each} bits", errors[each], bounds, curves=curves if each == 2 else ())
    for share in KEPT:
        kept = tuple(_kept_share(share, seed) for seed in effort.seeds)
        yield Figure(f"share kept by the statistical top-k, asked {share:g}", kept, Bounds(share - 0.01, share + 0.01))
    seven, spikes = zip(*(_spikes(seed) for seed in effort.seeds), strict=True)
    yield Figure("share of spike counts up to 7 at k = 3", seven, Bounds(at_least=0.94))
    yield Figure("bits set in a count at k = 3", spikes, Bounds(1.0, 1.5))


def _distortion(bits: int, seed: int, *, rotated: bool = True) -> float:
    torch.manual_seed(seed)
    cls = MIXERS.get("gated_delta_net")
    with torch.no_grad():
        _, state = cls(cls.Config(), LayerShape(WIDTH, HEADS))(torch.randn(4, TOKENS, WIDTH))
        rows = state["memory"].flatten(0, 2).double()
        if not rotated:
            step = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
            rounded = ((rows / step - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step
        else:
            length = rows.norm(dim=-1, keepdim=True) * rows.shape[-1] ** -0.5
            turn = torch.linalg.qr(torch.randn(rows.shape[-1], rows.shape[-1], dtype=torch.float64)).Q
            code = codebook(bits)
            place = torch.bucketize(rows @ turn / length, (code[1:] + code[:-1]) / 2)
            rounded = code[place] * length @ turn.T
        return ((rounded - rows).square().sum(-1) / rows.square().sum(-1)).mean().item()


def codebook(bits: int) -> Tensor:
    """The `2^bits` numbers that a normal one is best rounded to (Lloyd and Max): each the mean of what is nearest."""
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    code = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(200):
        nearest = torch.bucketize(grid, (code[1:] + code[:-1]) / 2)
        mass, moment = (torch.zeros_like(code).index_add_(0, nearest, part) for part in (weight, weight * grid))
        code = moment / mass
    return code


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
    claim="TurboQuant rounds at a distortion of 0.117, 0.03 and 0.009 at 2, 3 and 4 bits (arXiv 2504.19874); "
    "Spark's statistical top-k keeps the share it is asked for (arXiv 2506.06644); SpikingBrain's counts "
    "at k = 3 fit into three bits for 94.1% and set 1.13 bits a value (arXiv 2509.05276)",
    method="a random rotation and the codebook of normal numbers on state rows of a Gated DeltaNet layer, "
    "within a quarter of the paper's; thresholds and counts on normal activations, where the papers have "
    "a model's own",
    axes=Axes("bits a number", "relative squared error", log_y=True),
    measure=measure,
    sources=("2504.19874", "2506.06644", "2509.05276"),
)
