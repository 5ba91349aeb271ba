"""How many heads make a state space model, and whose gradients reach far (Ghodsi 2025, arXiv 2512.15115)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from experiments.interaction.operator import interaction
from seqtrain.kernels import linear_attention
from seqtrain.mixers import MIXERS, LayerShape, Mixer

TOKENS, WIDTH, STATES = 24, 16, 4
DISTANCES = (4, 16, 64, 256)
TRIED, REACH_WIDTH = 128, 32
# Whether the best input's gradient stays, over the distances.
FADING = ("s5", "s4d", "retnet", "gated_delta_net")
REACH = (("attention", Bounds(at_least=0.3)), *((name, Bounds(at_most=0.1)) for name in FADING))


def measure(effort: Effort) -> Iterator[Figure]:
    """Ranks by the heads, an SSM rebuilt from heads, and gradients over the distance."""
    for heads in (1, 2, 4):
        found = tuple(float(interaction(_mixer("attention", heads, seed), _row(seed)).rank) for seed in effort.seeds)
        yield Figure(f"interaction rank of attention with {heads} heads", found, Bounds(heads, heads), length=TOKENS)
    rebuilt = tuple(rebuilding_error(STATES, seed) for seed in effort.seeds)
    yield Figure(f"an SSM of {STATES} states by {STATES} heads: relative error", rebuilt, Bounds(at_most=1e-10))
    fewer = tuple(rebuilding_error(STATES - 1, seed) for seed in effort.seeds)
    yield Figure(f"the same by {STATES - 1} heads", fewer, Bounds(at_least=1e-3))
    distances = DISTANCES[: 2 if effort.scale < 0.1 else None]
    for name, bounds in REACH:
        rows = [best_reach(name, distances, effort.of(TRIED), seed) for seed in effort.seeds]
        yield Figure(
            f"{name}: best input's gradient at distance {distances[-1]} over that at {distances[0]}",
            tuple(row[-1] / row[0] for row in rows),
            bounds,
            length=distances[-1] + 1,
            curves=seed_curves(name, effort.seeds[:1], [float(distance) for distance in distances], rows[:1]),
        )


def _mixer(name: str, heads: int, seed: int) -> Mixer:
    torch.manual_seed(seed)
    cls = MIXERS.get(name)
    return cls(cls.Config(), LayerShape(WIDTH, heads))


def _row(seed: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def rebuilding_error(heads: int, seed: int) -> float:
    """Of `y_t = C sum_j A^(t-j) B x_j`, A diagonal with `STATES` values, by heads of attention with a value each.

    A head weighs token j by `a^(t-j)` and has the values `C_n B_n x`: `linear_attention` with one key channel and a
    decay. With fewer heads than states the slowest ones are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.linspace(0.5, 0.95, STATES, dtype=torch.float64)
    b, c = torch.randn(2, STATES, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    state, rows = torch.zeros(STATES, dtype=torch.float64), []
    for token in x[0]:
        state = a * state + b @ token
        rows.append(state @ c)
    wanted = torch.stack(rows)
    kept = slice(STATES - heads, None)
    values = (x @ b[kept].T)[..., None] * c[kept]  # B T H D
    one = torch.ones(1, TOKENS, heads, 1, dtype=torch.float64)
    out, _ = linear_attention(one, one, values, a[kept].log().expand(1, TOKENS, -1), scale=1.0)
    return ((out.sum(2)[0] - wanted).norm() / wanted.norm()).item()


def best_reach(name: str, distances: tuple[int, ...], tried: int, seed: int) -> list[float]:
    """For each distance the largest gradient of a last token's output by one input, over inputs that are tried."""
    torch.manual_seed(seed)
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(), LayerShape(REACH_WIDTH, 1))
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=REACH_WIDTH**-0.5)
    signs, found = torch.randn(REACH_WIDTH), []
    for distance in distances:
        # All tokens are alike but the two that are looked at, which look for each other.
        x = torch.randn(tried, 1, REACH_WIDTH).mul(0.02).repeat(1, distance + 1, 1)
        x[:, 0], x[:, -1] = 3 * torch.randn(2, tried, REACH_WIDTH)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((mixer(x)[0][:, -1] @ signs).sum(), x)
        found.append(gradient[:, 0].norm(dim=-1).max().item())
    return found


ROW = Row(
    name="heads",
    claim="attention's interaction rank is its heads, as many heads as states are needed and enough for a diagonal "
    "SSM, and attention has inputs whose gradients do not fade with the distance, which stable linear dynamics do not "
    "(Ghodsi 2025, arXiv 2512.15115)",
    method=f"ranks over {TOKENS} tokens; the gradient of the last token by the first, the largest of {TRIED} "
    "pairs of inputs, other tokens small: the theorem is about the best input, while the mean over "
    "random ones fades in attention too, as its weights are shared. The bounds of 0.3 and 0.1 are ours",
    axes=Axes("distance, tokens", "largest gradient", log_x=True, log_y=True),
    measure=measure,
    sources=("2512.15115",),
)
