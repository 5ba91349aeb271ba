"""The score on held-out data."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.data import HeldOutParts, SyntheticBatches
from seqtrain.data.batches import IGNORED
from seqtrain.models.spiking import SpikeStatistics, counting_spikes, spikes_counted
from seqtrain.runtime.metrics import Within
from seqtrain.runtime.segmented import Segment, States, carried
from seqtrain.runtime.step import TrainState
from seqtrain.runtime.task import HeldOut

# What a record says of an evaluation, by key: bits per byte for text, accuracy and nats per answer for a task.
Scores = dict[str, float | None]


@torch.no_grad()
def evaluate(state: TrainState) -> Scores | None:
    """Scores the model on all held-out batches; every rank calls it. None when the run was asked to stop meanwhile.

    `held_out_bits_per_byte`: bits the model needs for a byte of text, given the text before it in the same window;
    None where none is held out. Of a synthetic task instead `held_out_accuracy`, the share of answers that are the
    likeliest token, and `held_out_loss`, nats per answer. Of a mixture both, each over all sources that have it, and
    those of each source with `/NAME` after the key. Where projections are given spikes also what `SpikeStatistics` says
    of these, as `spike_silent`, `spikes_per_value`, `spike_within` and `spike_sparsity`.
    """
    held_out, ranks = state.trainable.held_out, state.ranks
    if held_out is None:
        return {"held_out_bits_per_byte": None}
    parts = held_out.parts if isinstance(held_out, HeldOutParts) else {"": held_out}
    done, found = 0, []
    state.engine.model.train(False)
    try:
        with counting_spikes(state.engine.module):
            for name, batches in parts.items():
                sums = _score_all(state, batches, done=done, of=len(held_out))
                if sums is None:
                    return None
                found.append((name, isinstance(batches, SyntheticBatches), sums))
                done += len(batches)
    finally:
        state.engine.model.train()
    scores = _figures(found)
    if (counted := spikes_counted(state.engine.module))[0]:
        spikes = SpikeStatistics.of(torch.tensor(ranks.sum(*counted.tolist())))
        scores |= {"spike_silent": spikes.silent, "spikes_per_value": spikes.spikes}
        scores |= {"spike_within": spikes.within, "spike_sparsity": spikes.sparsity}
    return scores


def _figures(found: list[tuple[str, bool, list[float]]]) -> Scores:
    """What a record says of the parts that were scored: `(name, whether it is a task, sums of _score_all)`."""
    scores: Scores = {}
    for answers in (False, True):
        chosen = [(name, sums) for name, task, sums in found if task == answers]
        whole = [sum(column) for column in zip(*(sums for _, sums in chosen), strict=True)]
        named = [(f"/{name}", sums) for name, sums in chosen if name]
        for suffix, (nats, right, asked, text) in [("", whole), *named] if chosen else ():
            if answers:
                scores[f"held_out_accuracy{suffix}"] = right / asked
                scores[f"held_out_loss{suffix}"] = nats / asked
            else:
                scores[f"held_out_bits_per_byte{suffix}"] = nats / math.log(2) / text if text else None
    return scores or {"held_out_bits_per_byte": None}


def _score_all(state: TrainState, batches: HeldOut, *, done: int, of: int) -> list[float] | None:
    """Nats of all `batches`, right answers, answers asked for and bytes of text; None when a stop was requested.

    `done` batches of `of` were scored before.
    """
    ranks, sums = state.ranks, [0.0, 0.0, 0.0, 0.0]
    for index in range(len(batches)):
        batch = batches.at(index, state.slice()).to(ranks.device)
        scored = _score(state.engine.model, state.cut(batch), answers=isinstance(batches, SyntheticBatches))
        *found, stopping = ranks.sum(*scored, batches.text_bytes(batch), state.stop_requested())
        sums = [total + part for total, part in zip(sums, found, strict=True)]
        if stopping:
            return None
        if state.metrics:
            state.metrics.within(Within(state.progress.step, done + index + 1, of, evaluation=True))
            state.poll()
    return sums


def _score(model: nn.Module, segments: list[Segment], *, answers: bool) -> list[float]:
    """Nats of a row, right answers and answers asked for; the two are 0 where the labels are no answers."""
    past: States | None = None
    sums = [0.0, 0.0, 0.0]
    for segment in segments:
        options: dict[str, Any] = {"state": past, "sequence": segment.sequence}
        keep = segment is not segments[-1]
        if answers:
            logits, after = model(segment.tokens, **options, all_logits=True)
            found = _score_answers(logits, segment.labels)
        else:
            came = model(segment.tokens, segment.labels, **options, keep_state=keep)
            loss, after = came if keep else (came, None)
            found = [loss.item(), 0, 0]
        past = carried(after, segment.group) if keep else None
        sums = [total + part for total, part in zip(sums, found, strict=True)]
    return sums


def _score_answers(logits: Tensor, labels: Tensor) -> list[float]:
    """`logits: [1,n,vocab]`, `labels: [1,n]` -> nats, right answers and answers asked for, summed."""
    asked = labels != IGNORED
    scores, answers = logits[asked], labels[asked]
    nats = F.cross_entropy(scores, answers, reduction="sum")
    return [nats.item(), int((scores.argmax(-1) == answers).sum()), len(answers)]
