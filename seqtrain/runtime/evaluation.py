"""The score on held-out data."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.data import SyntheticBatches
from seqtrain.data.batches import IGNORED
from seqtrain.models.spiking import spike_statistics
from seqtrain.models.streaming import Segment, States, stream_forward
from seqtrain.parallel.mesh import Mesh
from seqtrain.runtime.objective import HeldOut
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.rows import as_segments, read_row
from seqtrain.runtime.signals import StopRequest

# What a record says of an evaluation, by key: bits a byte for text, accuracy and nats an answer for a task.
Scores = dict[str, float | None]


@torch.no_grad()
def evaluate(
    engine: Any,
    batches: HeldOut,
    ranks: Ranks,
    mesh: Mesh,
    stop: StopRequest,
    *,
    pieces: int,
    backend: str,
) -> Scores | None:
    """Scores the model on all of `batches`; every rank calls it. None when the run was asked to stop meanwhile.

    `held_out_bits_per_byte`: bits the model needs for a byte of text, given the text before it in the same window;
    None where none is held out. Of a task instead `held_out_accuracy`, the share of answers that are the likeliest
    token, and `held_out_loss`, nats an answer. Where activations are spike counts also `spike_sparsity`, the share of
    them that are 0. `pieces`: segments in which a batch goes through the model.
    """
    answers = isinstance(batches, SyntheticBatches)
    score = partial(_run_task if answers else _run_text, engine)
    scores: Scores
    engine.eval()
    sums = [0.0, 0.0, 0.0, 0.0]
    try:
        for index in range(len(batches)):
            row = read_row(partial(batches.at, index), mesh, pieces=pieces)
            parts = as_segments(row, mesh, backend=backend, device=ranks.device)
            scored = zip(*stream_forward(score, parts), strict=True)
            *found, stopping = ranks.sum(*map(sum, scored), sum(part.bytes for part in row), stop.requested())
            sums = [total + part for total, part in zip(sums, found, strict=True)]
            if stopping:
                return None
    finally:
        engine.train()
    nats, right, asked, text = sums
    if answers:
        scores = {"held_out_accuracy": right / asked, "held_out_loss": nats / asked}
    else:
        scores = {"held_out_bits_per_byte": nats / math.log(2) / text if text else None}
    if (spikes := spike_statistics(engine.module, reset=True)) is not None:
        values, zeros = ranks.sum(spikes.values, spikes.sparsity * spikes.values)
        scores["spike_sparsity"] = zeros / values
    return scores


def _run_text(
    engine: Any, segment: Segment, state: States | None, *, keep_state: bool
) -> tuple[list[float], States | None]:
    found = engine(segment.tokens, segment.labels, state, sequence=segment.sequence, keep_state=keep_state)
    nats, after = found if keep_state else (found, None)
    return [nats.item(), 0, 0], after


def _run_task(
    engine: Any, segment: Segment, state: States | None, *, keep_state: bool
) -> tuple[list[float], States | None]:
    logits, after = engine(segment.tokens, state=state, sequence=segment.sequence, all_logits=True)
    return _score_answers(logits, segment.labels), after if keep_state else None


def _score_answers(logits: Tensor, labels: Tensor) -> list[float]:
    """`logits: [1,n,vocab]`, `labels: [1,n]` -> nats, right answers and answers asked for, summed."""
    asked = labels != IGNORED
    scores, answers = logits[asked], labels[asked]
    nats = F.cross_entropy(scores, answers, reduction="sum")
    return [nats.item(), int((scores.argmax(-1) == answers).sum()), len(answers)]
