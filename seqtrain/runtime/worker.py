"""What every rank runs: the steps of a training run, from wherever it was left to the last one."""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.data import Batch
from seqtrain.errors import SeqtrainError
from seqtrain.memory import peak_resident_bytes
from seqtrain.models.streaming import stream_backward
from seqtrain.parallel.mesh import Mesh, form_mesh
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime import engine as engines
from seqtrain.runtime.checkpoint import Checkpoint, Progress
from seqtrain.runtime.evaluation import Scores, evaluate
from seqtrain.runtime.metrics import MetricsFile, Record, Within, write_within
from seqtrain.runtime.objective import PRETRAINING, Objective, Work
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.rows import as_segments, read_row
from seqtrain.runtime.run_folder import RunFolder, check_fits, trajectory
from seqtrain.runtime.schedule import learning_rate
from seqtrain.runtime.settings import PretrainConfig, segments
from seqtrain.runtime.signals import StopRequest
from seqtrain.runtime.watch import UNWATCHED, Watch

log = logging.getLogger("seqtrain.runtime")


@dataclass(frozen=True)
class Session:
    """One call of `run`: its settings, and what the process that started it tells the ranks."""

    config: PretrainConfig
    # Folder of the prepared corpus.
    corpus: Path
    # Tells the restarts of one call from later calls on the same folder.
    name: str
    # Run of Weights & Biases; empty without.
    tracking_id: str
    # What is trained.
    objective: Objective = PRETRAINING
    # Who looks on.
    watch: Watch = UNWATCHED

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output_dir))

    # Found once: an objective may read whole files for it, and every checkpoint asks.
    @cached_property
    def trajectory(self) -> dict[str, Any]:
        """What decides which numbers come out; checkpoints made with other values are refused."""
        return trajectory(self.config) | self.objective.trajectory()


@dataclass
class Training:
    """What a rank holds while it trains."""

    session: Session
    ranks: Ranks
    mesh: Mesh
    engine: Any
    work: Work
    stop: StopRequest
    progress: Progress
    # Rank 0's; None on the others.
    metrics: MetricsFile | None
    # Step of the newest checkpoint.
    saved_step: int
    # Numbers the model learns, all ranks together.
    parameters: int

    @property
    def config(self) -> PretrainConfig:
        return self.session.config


def train(session: Session, ranks: Ranks, *, after_step: Callable[[], None] = lambda: None) -> None:
    """Trains to the last step, or until a stop is requested; writes metrics, checkpoints and the outcome.

    Every rank calls it with the same `session`, in a process group that is already formed. Goes on from the newest
    whole checkpoint in the run's folder. `after_step` is called after each line of metrics, and each segment of a step.
    Raises `CheckpointError` for a checkpoint that doesn't fit, `SeqtrainError` when too many steps in a row aren't
    finite.
    """
    parallel = session.config.parallel
    with form_mesh(
        ranks.group,
        sequence=parallel.sequence,
        algorithm=parallel.algorithm,
        device=ranks.device,
        timeout_seconds=session.config.runtime.collective_timeout_seconds,
    ) as mesh:
        _train_on(_prepare(session, ranks, mesh), after_step)


def _train_on(training: Training, after_step: Callable[[], None]) -> None:
    config, watch, scores, stopped = training.config, training.session.watch, None, False
    watch.begin(training)
    while training.progress.step < config.train.steps:
        with watch.during("step"):
            record = _step(training, after_step)
        if record is None:
            stopped = True
            break
        if _evaluation_due(config, training.progress.step):
            scores = _evaluate(training)
            record |= scores or {}
        if training.metrics:
            training.metrics.write(record)
        after_step()
        _give_up_if_hopeless(training)
        if _checkpoint_due(config, training.progress.step):
            _save(training)
    if scores is None and not stopped:
        # The run was stopped after its last step and before it was scored.
        scores = _evaluate(training)
        stopped = scores is None
    _save(training)
    _write_outcome(training, stopped=stopped, scores=scores)
    if not stopped:
        watch.end()


def _step(training: Training, after_segment: Callable[[], None]) -> Record | None:
    """One optimizer step over the global batch. None, with nothing changed, when a stop was requested."""
    config, ranks, index = training.config, training.ranks, training.progress.step
    started = time.perf_counter()
    with training.session.watch.during("data"):
        rows = _micro_batches(training, index)
    labels, stopping = ranks.sum(sum(part.label_count for row in rows for part in row), training.stop.requested())
    if stopping:
        return None
    # No layer draws anything today. Here a resumed run would draw the same; a run on another mesh would need draws that
    # follow from a token's place in the global batch.
    torch.manual_seed(hash((config.seed, index, ranks.rank)))
    rate = learning_rate(config.schedule, peak=config.optimizer.lr, steps=config.train.steps, step=index)
    engines.set_learning_rate(training.engine, rate)
    [loss_sum] = ranks.sum(_update_weights(training, rows, labels, after_segment))
    grad_norm, taken = engines.last_step(training.engine)

    tokens = config.train.batch_size * config.train.sequence_length
    training.progress = training.progress.after(taken=taken, tokens=tokens)
    seconds = time.perf_counter() - started
    return {
        "step": training.progress.step,
        "loss": loss_sum / max(labels, 1),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "grad_norm": grad_norm,
        "lr": rate,
        "step_seconds": seconds,
        "total_tokens": training.progress.tokens,
        "skipped": not taken,
    }


def _micro_batches(training: Training, index: int) -> list[list[Batch]]:
    """This rank's share of the global batch of step `index`: packed rows, each in the parts that are run at once.

    The ranks that share a sequence read their own tokens of it from the corpus; nothing is sent between them.
    """
    at, pieces = partial(training.work.batches.at, index), segments(training.config)
    count = engines.micro_batches(training.config)
    return [read_row(at, training.mesh, pieces=pieces, number=number, of=count) for number in range(count)]


def _update_weights(
    training: Training, rows: list[list[Batch]], labels: float, after_segment: Callable[[], None]
) -> float:
    """Forward and backward over this rank's micro-batches, then the optimizer. Gives their summed loss.

    `labels`: how many tokens of the global batch are predicted, all ranks together: the loss is the mean over those.
    """
    engine, ranks, config = training.engine, training.ranks, training.config
    weight = ranks.count * sum(len(row) for row in rows) / max(labels, 1)

    def backward(loss: Tensor) -> None:
        engines.backward(engine, loss, weight=weight)
        # The engine counts micro-batches by calls of `step`, and acts on the last.
        engine.step()

    def done(number: int, count: int, of: int) -> None:
        if training.metrics:
            write_within(training.session.folder, Within(training.progress.step, count + number * of, len(rows) * of))
            after_segment()

    loss_sum = torch.zeros((), device=ranks.device)
    for number, row in enumerate(rows):
        loss_sum += stream_backward(
            engine,
            as_segments(row, training.mesh, backend=config.kernels.backend, device=ranks.device),
            gradients=config.train.segment_gradients,
            backward=backward,
            done=partial(done, number),
        )
    return loss_sum.item()


def _evaluate(training: Training) -> Scores | None:
    with training.session.watch.during("evaluation"):
        return evaluate(
            training.engine,
            training.work.held_out,
            training.ranks,
            training.mesh,
            training.stop,
            pieces=segments(training.config),
            backend=training.config.kernels.backend,
        )


def _checkpoint_due(config: PretrainConfig, step: int) -> bool:
    return bool(config.checkpoint.every and step % config.checkpoint.every == 0)


def _evaluation_due(config: PretrainConfig, step: int) -> bool:
    every = config.evaluation.every
    return step == config.train.steps or bool(every and step % every == 0)


def _give_up_if_hopeless(training: Training) -> None:
    in_a_row, allowed = training.progress.skipped_in_a_row, training.config.train.max_nonfinite_steps
    if in_a_row > allowed:
        raise SeqtrainError(
            f"train.max_nonfinite_steps={allowed}: {in_a_row} steps in a row, up to step {training.progress.step}, had "
            "a loss or gradient that isn't finite; lower optimizer.lr, or go on from an earlier checkpoint"
        )


def _prepare(session: Session, ranks: Ranks, mesh: Mesh) -> Training:
    """Builds the model and its engine as they were at the newest checkpoint, or new, and opens the data."""
    config, folder = session.config, session.folder
    torch.manual_seed(config.seed)
    work = session.objective.work(config, session.corpus)
    found = ranks.from_first(_newest(session) if ranks.first else None)
    if found:
        found.load_weights(work.model)
    # Counted now: in ZeRO 3 a rank will hold only its part of each.
    parameters = sum(p.numel() for p in work.model.parameters())
    engine = engines.build_engine(work.model, work.groups, config, ranks)
    if found:
        found.restore_optimizer(engine)
    progress = found.progress if found else Progress()
    if ranks.first:
        log.info(
            "training: from step %d of %d, %s", progress.step, config.train.steps, found.folder if found else "new"
        )
    return Training(
        session=session,
        ranks=ranks,
        mesh=mesh,
        engine=engine,
        work=work,
        stop=StopRequest(folder.stop, watch_file=ranks.first),
        progress=progress,
        metrics=_open_metrics(session, ranks, progress) if ranks.first else None,
        saved_step=progress.step if found and found.folder.parent == folder.checkpoints else -1,
        parameters=parameters,
    )


def _newest(session: Session) -> Checkpoint | None:
    """The checkpoint to go on from: the run's own newest one, else the one `checkpoint.resume` names."""
    resume, now = session.config.checkpoint.resume, session.trajectory
    if own := checkpoints.find(session.folder.checkpoints):
        check_fits(own.folder, own.trajectory, now)
        return own
    if resume in ("auto", "never"):
        return None
    # The weights must fit; steps, data and learning rate may be new ones.
    other = checkpoints.read(Path(resume))
    for part in ("model", "mixer"):
        check_fits(other.folder, {part: other.trajectory[part]}, {part: now[part]})
    return other


def _open_metrics(session: Session, ranks: Ranks, progress: Progress) -> MetricsFile:
    metrics = MetricsFile(session.folder.metrics, step=progress.step)
    start = {"session": session.name, "step": progress.step, "ranks": ranks.count, "time": time.time()}
    with session.folder.starts.open("a") as file:
        file.write(json.dumps(start) + "\n")
    return metrics


def _save(training: Training) -> None:
    step = training.progress.step
    if step == training.saved_step:
        return
    with training.session.watch.during("checkpoint"):
        checkpoints.save(
            training.engine,
            training.session.folder.checkpoints,
            training.progress,
            training.ranks,
            keep=training.config.checkpoint.keep,
            trajectory=training.session.trajectory,
            tracking_id=training.session.tracking_id,
        )
    training.saved_step = step


def _write_outcome(training: Training, *, stopped: bool, scores: Scores | None) -> None:
    """Leaves what only the ranks know for the process that started them."""
    peak = training.ranks.largest(_peak_memory_bytes(training.ranks.device))
    if not (training.ranks.first and training.metrics):
        return
    training.metrics.close()
    outcome = {
        "stopped": stopped,
        "steps": training.progress.step,
        "parameters": training.parameters,
        "skipped_steps": training.progress.skipped,
        "total_tokens": training.progress.tokens,
        "peak_memory_bytes": int(peak),
        "held_out_bits_per_byte": None,
    } | (scores or {})
    partial = training.session.folder.outcome.with_suffix(".partial")
    partial.write_text(json.dumps(outcome))
    os.replace(partial, training.session.folder.outcome)


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
