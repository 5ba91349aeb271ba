"""What step rules promise: Lion's weights stay below 1 / lambda, refined schedules follow the gradients' norms."""

from collections.abc import Iterator

import torch

from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row
from seqtrain.runtime.schedule import refine

DECAY, RATE, STEPS = 0.5, 0.01, 2000
FIRST, LATER = 3.0, 1.0


def measure(effort: Effort) -> Iterator[Figure]:
    """Lion's largest weight times lambda; shapes of the refined schedule."""
    runs = [lion_bound(seed, effort.of(STEPS)) for seed in effort.seeds]
    places = tuple(float(step) for step in range(1, len(runs[0]) + 1))
    yield Figure(
        "Lion: largest weight over 1 / lambda at the end",
        tuple(run[-1] for run in runs),
        Bounds(at_most=1.01) if effort.scale >= 0.5 else Bounds(at_most=3.0),
        curves=(Curve(f"largest weight times lambda, seed {effort.seeds[0]}", places, tuple(runs[0])),),
    )
    steps = 100
    flat = refine([1.0] * steps, steps, power=-1)
    line = [(steps - 1 - step) / (steps - 1) for step in range(steps)]
    largest = max(abs(came - straight) for came, straight in zip(flat, line, strict=True))
    yield Figure("refined schedule of constant norms: distance from linear decay", (largest,), Bounds(at_most=0.02))
    norms = [FIRST - (FIRST - LATER) * min(1.0, step / 10) for step in range(steps)]
    shape = refine(norms, steps, power=-1)
    yield Figure(
        "... of norms that fall at first: its first rate over its highest",
        (shape[0] / max(shape),),
        Bounds(at_most=0.6),
    )
    yield Figure("... share of the run at which it is highest", (shape.index(max(shape)) / steps,), Bounds(0.03, 0.2))


def lion_bound(seed: int, steps: int) -> list[float]:
    """The largest weight times lambda after each step, from weights three times as large, on random gradients."""
    from pytorch_optimizer import Lion

    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(3 / DECAY * torch.sign(torch.randn(64, 64, generator=generator)))
    optimizer = Lion([weight], lr=RATE, betas=(0.9, 0.99), weight_decay=DECAY, weight_decouple=True)
    lean, found = torch.randn(64, 64, generator=generator), []
    for _ in range(steps):
        # Gradients that lean one way push the weights as far as they go.
        weight.grad = torch.randn(64, 64, generator=generator) + 2 * lean
        optimizer.step()
        found.append(weight.abs().max().item() * DECAY)
    return found


ROW = Row(
    name="steps",
    claim="Lion solves a problem whose weights are bounded by 1 / lambda (Chen et al. 2023, arXiv 2310.05898); "
    "a schedule refined from gradient norms is linear decay where these are constant, with a warm-up "
    "where they fall at first (Defazio et al. 2023, arXiv 2310.07831)",
    method=f"Lion on random gradients that lean one way, lambda {DECAY:g}, rate {RATE:g}, {STEPS} steps from "
    "weights of 3 / lambda. That refined schedules end better was not seen in runs this short, which "
    "need no annealing",
    axes=Axes("step", "largest weight times lambda", log_y=True),
    measure=measure,
    sources=("2310.05898", "2310.07831"),
)
