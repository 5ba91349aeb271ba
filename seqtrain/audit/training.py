"""What a trainer must keep: the denominator of the loss, and a run that goes on as if it had not stopped."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.audit.probe import ROUNDINGS, Probe
from seqtrain.audit.subject import IGNORED, Finding, MicroBatch, NotChecked, Trainer

# Labels that count, by micro-batch, the last of which has none.
COUNTED = (23, 5, 0)
STEPS = 4


def loss_denominator(probe: Probe) -> Iterator[Finding]:
    """The loss is a mean over all labels that count, however they lie in micro-batches."""
    trainer = _trainer(probe)
    if trainer.gradients is None:
        raise NotChecked("no such function (trainer: gradients=)")
    row = probe.rows(len(COUNTED), probe.subject.tokens + 1)
    batches = [(row[i : i + 1, :-1], _only(row[i : i + 1, 1:], count)) for i, count in enumerate(COUNTED)]
    # Each alone and no longer than its labels: here all ways to count agree.
    alone = [trainer.gradients([(x[:, :n], y[:, :n])]) for (x, y), n in zip(batches, COUNTED, strict=True) if n]
    weights = [n / sum(COUNTED) for n in COUNTED if n]
    loss = sum(n * each for n, (each, _) in zip(weights, alone, strict=True))
    mean = {
        name: torch.stack([n * grads[name] for n, (_, grads) in zip(weights, alone, strict=True)]).sum(0)
        for name in alone[0][1]
    }
    came, grads = trainer.gradients(batches)
    look = "what the loss is divided by: the labels of all micro-batches and ranks, also where one has none"
    # Sums of as many terms in another order.
    limit = ROUNDINGS * torch.finfo(torch.float32).eps
    if not abs(came - loss) <= limit * abs(loss):
        yield Finding("loss denominator", "", f"the loss is {came:.6f}, a mean over labels {loss:.6f}", look)
    if (far := _distance(grads, mean)) and not far[1] <= limit * 16:
        yield Finding("loss denominator", far[0], f"its gradient is off by {far[1]:.1%}", look)


def _only(labels: Tensor, count: int) -> Tensor:
    return torch.where(torch.arange(labels.shape[1]) < count, labels, IGNORED)


def resume(probe: Probe) -> Iterator[Finding]:
    """Steps, a checkpoint, and steps give the bits of as many steps without a stop."""
    trainer = _trainer(probe)
    if trainer.save is None or trainer.load is None:
        raise NotChecked("no such functions (trainer: save=, load=)")
    whole = trainer.start()
    losses = [_step(probe, trainer, whole, index) for index in range(STEPS)]
    run = trainer.start()
    came = [_step(probe, trainer, run, index) for index in range(STEPS // 2)]
    look = "what a step is made of: moments, step count, learning rate, random numbers, the place in the data"
    if came != losses[: STEPS // 2]:
        yield Finding("resume", "", "two runs of the same steps differ without a stop", "random numbers without a seed")
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(run, Path(folder))
        saved, run = {name: each.clone() for name, each in trainer.weights(run).items()}, trainer.load(Path(folder))
    if where := _first_apart(trainer.weights(run), saved):
        yield Finding(
            "resume", where, "its weights are not those that were saved", "names, shapes and dtypes in the files"
        )
    came += [_step(probe, trainer, run, index) for index in range(STEPS // 2, STEPS)]
    apart = next((index for index, pair in enumerate(zip(came, losses, strict=True)) if pair[0] != pair[1]), None)
    where = _first_apart(trainer.weights(run), trainer.weights(whole))
    if apart is not None or where:
        far = max(_far(trainer.weights(run)[name], each) for name, each in trainer.weights(whole).items())
        begins = f"from step {apart + 1} on" if apart is not None else "after the last step"
        what = f"another run than without a stop {begins}, weights are {far:.0e} of the largest apart"
        yield Finding("resume", where, what, look)


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max().clamp_min(1e-30))


def _step(probe: Probe, trainer: Trainer, run: Any, index: int) -> float:
    if trainer.draw is not None:
        return trainer.step(run, trainer.draw(run))
    rows = [probe.rows(2, 33, seed=10 * index + each) for each in range(2)]
    batches: Sequence[MicroBatch] = [(row[:, :-1], row[:, 1:]) for row in rows]
    return trainer.step(run, batches)


def _trainer(probe: Probe) -> Trainer:
    if probe.subject.trainer is None:
        raise NotChecked("no trainer")
    return probe.subject.trainer


def _first_apart(came: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first weight whose bits differ or that is missing, "" where there is none."""
    names = (name for name, each in expected.items() if name not in came or not torch.equal(came[name], each))
    return next(names, "")


def _distance(came: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The gradient that is furthest off, and by how much of its size (of the largest, where it nearly vanishes)."""
    largest = max(float(each.norm()) for each in expected.values())
    far = {
        name: float((came.get(name, 0 * each) - each).norm()) / max(float(each.norm()), largest / 30)
        for name, each in expected.items()
    }
    return max(far.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"), default=None)
