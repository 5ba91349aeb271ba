"""The score on held-out data."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.data import SyntheticBatches
from seqtrain.data.batches import IGNORED
from seqtrain.models.spiking import spike_statistics
from seqtrain.runtime.metrics import Within, write_within
from seqtrain.runtime.segmented import Segment, States, alone, cut
from seqtrain.runtime.step import TrainState

# What a record says of an evaluation, by key: bits per byte for text, accuracy and nats per answer for a task.
Scores = dict[str, float | None]


@torch.no_grad()
def evaluate(state: TrainState) -> Scores | None:
    """Scores the model on all held-out batches; every rank calls it. None when the run was asked to stop meanwhile.

    `held_out_bits_per_byte`: bits the model needs for a byte of text, given the text before it in the same window;
    None where none is held out. Of a synthetic task instead `held_out_accuracy`, the share of answers that are the
    likeliest token, and `held_out_loss`, nats per answer. Where activations are spike counts also `spike_sparsity`, the
    share of them that are 0.
    """
    batches, ranks = state.trainable.held_out, state.ranks
    if batches is None:
        return {"held_out_bits_per_byte": None}
    answers = isinstance(batches, SyntheticBatches)
    scores: Scores
    state.engine.model.train(False)
    sums = [0.0, 0.0, 0.0, 0.0]
    try:
        for index in range(len(batches)):
            batch = batches.at(index, state.slice()).to(ranks.device)
            segments = [Segment(batch.tokens, batch.labels, state.sequence(batch))]
            if state.segments > 1:
                segments = cut(batch, state.segments, backend=state.config.kernels.backend)
            scored = _score(state.engine.model, segments, answers=answers)
            *found, stopping = ranks.sum(*scored, batches.text_bytes(batch), state.stop_requested())
            sums = [total + part for total, part in zip(sums, found, strict=True)]
            if stopping:
                return None
            if state.metrics:
                write_within(state.lease, Within(state.progress.step, index + 1, len(batches), evaluation=True))
                state.poll()
    finally:
        state.engine.model.train()
    nats, right, asked, text = sums
    if answers:
        scores = {"held_out_accuracy": right / asked, "held_out_loss": nats / asked}
    else:
        scores = {"held_out_bits_per_byte": nats / math.log(2) / text if text else None}
    if (spikes := spike_statistics(state.engine.module, reset=True)) is not None:
        values, zeros = ranks.sum(spikes.values, spikes.sparsity * spikes.values)
        scores["spike_sparsity"] = zeros / values
    return scores


def _score(model: nn.Module, segments: list[Segment], *, answers: bool) -> list[float]:
    """Nats of a row, right answers and answers asked for; the two are 0 where the labels are no answers."""
    carried: States | None = None
    sums = [0.0, 0.0, 0.0]
    for segment in segments:
        options: dict[str, Any] = {"state": carried if segment.continues else None, "sequence": segment.sequence}
        keep = segment is not segments[-1]
        if answers:
            logits, carried = model(segment.tokens, **options, all_logits=True)
            found = _score_answers(logits, segment.labels)
        else:
            came = model(segment.tokens, segment.labels, **options, keep_state=keep)
            loss, carried = came if keep else (came, None)
            found = [loss.item(), 0, 0]
        carried = alone(carried) if keep and carried else None
        sums = [total + part for total, part in zip(sums, found, strict=True)]
    return sums


def _score_answers(logits: Tensor, labels: Tensor) -> list[float]:
    """`logits: [1,n,vocab]`, `labels: [1,n]` -> nats, right answers and answers asked for, summed."""
    asked = labels != IGNORED
    scores, answers = logits[asked], labels[asked]
    nats = F.cross_entropy(scores, answers, reduction="sum")
    return [nats.item(), int((scores.argmax(-1) == answers).sum()), len(answers)]
