"""One training step on one rank: from the batch that is read to the weights that change."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from seqtrain.data import Batch, BatchSlice, Verification
from seqtrain.parallel.mesh import Mesh
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sharded import ShardedSequence
from seqtrain.runtime.cadence import SaveClock
from seqtrain.runtime.checkpoint import Progress
from seqtrain.runtime.compilation import mark_documents
from seqtrain.runtime.engine import Engine
from seqtrain.runtime.experts import Experts
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.measures import Measures
from seqtrain.runtime.metrics import MetricsFile, Record, Within
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.read_ahead import ReadAhead
from seqtrain.runtime.saving import Saver
from seqtrain.runtime.schedule import learning_rate
from seqtrain.runtime.segmented import Segment, cut, passes, segment_losses
from seqtrain.runtime.settings import PretrainConfig, micro_batch, segments, uneven, unit, units
from seqtrain.runtime.signals import stop_requested
from seqtrain.runtime.task import Callback, Trainable


@dataclass
class TrainState:
    """Where a run stands on one rank."""

    config: PretrainConfig
    # Writes checkpoints.
    saver: Saver
    lease: Lease
    # Appears when the run is to stop.
    stop: Path
    ranks: Ranks
    mesh: Mesh
    engine: Engine
    experts: Experts
    measures: Measures
    trainable: Trainable
    callback: Callback
    progress: Progress
    # Rank 0's; None on the others.
    metrics: MetricsFile | None
    # Lets the driver look at what was written, where it is this process.
    poll: Callable[[], None]
    # Numbers the model has, all ranks together, and those of them that are trained.
    parameters: int
    trained: int
    # Step of the newest checkpoint, which may still be being written.
    saved_step: int
    # When one is due by the clock; rank 0's alone decides, before each step.
    clock: SaveClock
    # Shape of a refined schedule.
    refined: list[float]
    # Whether rank 0 wants a checkpoint after the current step.
    save_due: bool = False

    @cached_property
    def segments(self) -> int:
        """Pieces in which a row runs through the model, one after the other."""
        return segments(self.config)

    @cached_property
    def read(self) -> ReadAhead:
        """Gives what this rank runs through the model in a step, one after the other."""
        return ReadAhead(self._read, stop=self.config.train.steps)

    def _read(self, step: int) -> list[Batch]:
        train, rows = self.config.train, unit(self.config.train)
        of = -(-rows // (self.config.parallel.data * micro_batch(self.config)))
        return [
            self.trainable.batches.at(index, self.slice(number, of))
            for index in units(train, step)
            for number in range(of)
        ]

    @cached_property
    def verification(self) -> Verification:
        """What this rank verifies of the data meanwhile."""
        always = self.config.data.verify == "always"
        return Verification(self.trainable.to_verify, rank=self.ranks.rank, ranks=self.ranks.count, always=always)

    def stop_requested(self) -> bool:
        """Whether this rank knows of a request to stop."""
        return stop_requested(self.stop if self.ranks.first else None)

    def slice(self, number: int = 0, of: int = 1) -> BatchSlice:
        """What this rank reads of a batch: micro-batch `number` of `of`."""
        mesh, pieces = self.mesh, self.segments
        of_row = mesh.sequence_rank, mesh.sequence_ranks, pieces, uneven(self.config)
        return BatchSlice(mesh.data_rank, mesh.data_ranks, number, of, *of_row)

    def cut(self, batch: Batch) -> list[Segment]:
        """What runs through the model one after the other."""
        if self.segments == 1:
            return [Segment(batch.tokens, batch.labels, self.sequence(batch))]
        backend = self.config.kernels.backend
        return cut(batch, group=self.mesh.group, backend=backend, algorithm=self.mesh.algorithm)

    def sequence(self, batch: Batch) -> SequenceContext:
        """What the layers are told of a row that runs through the model in one piece."""
        mesh, backend = self.mesh, self.config.kernels.backend
        if self.config.train.compile:
            mark_documents(batch.cu_seqlens)
        if mesh.group is None:
            return SequenceContext(batch.cu_seqlens, backend)
        return ShardedSequence(
            cu_seqlens=batch.cu_seqlens,
            backend=backend,
            group=mesh.group,
            offsets=batch.offsets,
            algorithm=mesh.algorithm,
        )


def train_step(state: TrainState) -> Record | None:
    """One optimizer step over the global batch. None, with nothing changed, when a stop was requested.

    Raises as `Saver.wait` where a save has failed meanwhile.
    """
    config, ranks, engine, index = state.config, state.ranks, state.engine, state.progress.step
    started = time.perf_counter()
    with state.callback.phase("data"):
        batches = [batch.to(ranks.device) for batch in state.read(index)]
    due = ranks.first and state.clock.due()
    counted = sum(batch.label_count for batch in batches)
    labels, stopping, agreed, failed = ranks.sum(counted, state.stop_requested(), due, state.saver.failed)
    if failed:
        state.saver.wait()
    if stopping:
        return None
    state.save_due = bool(agreed)
    # No layer draws anything today. Here a resumed run would draw the same; a run on another mesh would need draws that
    # follow from a token's place in the global batch.
    torch.manual_seed(hash((config.seed, index, ranks.rank)))
    peak, steps = config.optimizer.lr, config.train.steps
    rate = learning_rate(config.schedule, peak=peak, steps=steps, step=index, refined=state.refined)
    engine.set_learning_rate(rate)
    engine.set_passes(len(batches) * state.segments)
    state.measures.begin(index + 1)
    # The loss is the mean over the labels of the global batch, all ranks together.
    labels = max(labels, 1)
    weight = ranks.count * state.segments * len(batches) / labels
    # Routers' losses are means over a micro-batch; the mean over all of them is added to it.
    # Tensor-parallel ranks, which read the same, count each label again.
    micro_batches = state.mesh.data_ranks * state.mesh.tensor.count * len(batches)
    routers = labels / micro_batches
    loss_sum = torch.zeros((), device=ranks.device)
    for number, batch in enumerate(batches):
        if state.segments > 1:
            loss_sum += _train_segments(state, batch, weight, routers, number, len(batches))
            continue
        loss = engine.model(batch.tokens, batch.labels, sequence=state.sequence(batch))
        engine.backward(loss + routers * state.experts.loss(), weight=weight)
        engine.step()
        state.measures.count(batch, state.mesh.sequence_rank, state.mesh.sequence_ranks)
        loss_sum += loss.detach()
        # Its graph, before the next forward pass makes another.
        del loss
    [loss_total] = ranks.sum(loss_sum.item())
    grad_norm, taken = engine.last_step()
    routed = state.experts.finish_step(engine, ranks, taken=taken, micro_batches=micro_batches)

    tokens = len(units(config.train, index)) * unit(config.train) * config.train.sequence_length
    state.progress = state.progress.after(taken=taken, tokens=tokens)
    seconds = time.perf_counter() - started
    record = {
        "step": state.progress.step,
        "loss": loss_total / labels,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "grad_norm": grad_norm,
        "lr": rate,
        "step_seconds": seconds,
        "total_tokens": state.progress.tokens,
        "skipped": not taken,
        **state.trainable.epochs(units(config.train, index).stop),
        **routed,
    }
    return state.measures.finish(record)


def _train_segments(state: TrainState, batch: Batch, weight: float, routers: float, number: int, rows: int) -> Tensor:
    """Forward and backward over row `number` of `rows`, segment by segment; its loss, summed over tokens."""
    gradients, losses = state.config.train.segment_gradients, []
    pieces = state.cut(batch)
    experts, whole = state.experts, state.experts.need_counts
    counts: Tensor | int = 0
    of = passes(len(pieces), gradients, whole=whole)
    for done, loss in enumerate(segment_losses(state.engine.model, pieces, gradients, whole=whole), 1):
        if loss is None:
            counts = counts + experts.count()
        else:
            state.engine.backward(loss + routers * experts.loss(counts), weight=weight)
            state.engine.step()
            losses.append(loss.detach())
        if state.metrics:
            state.metrics.within(Within(state.progress.step, done + number * of, rows * of))
            state.poll()
    mesh = state.mesh
    state.measures.count(batch, mesh.sequence_rank, mesh.sequence_ranks, backwards=gradients == "exact")
    return torch.stack(losses).sum()
