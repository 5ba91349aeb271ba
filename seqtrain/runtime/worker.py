"""What every rank runs: a training run, from wherever it was left to its last step."""

import gc
import json
import logging
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seqtrain.collector import paused
from seqtrain.errors import DamagedError, SeqtrainError
from seqtrain.files import create_new, place, replace_file
from seqtrain.kernels import node_cache, products
from seqtrain.models import LanguageModel
from seqtrain.parallel.mesh import Mesh, form_mesh
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.cadence import save_clock
from seqtrain.runtime.checkpoint import Checkpoint, Progress
from seqtrain.runtime.engine import Engine
from seqtrain.runtime.evaluation import Scores, evaluate
from seqtrain.runtime.experts import Experts
from seqtrain.runtime.lease import Lease, succeed
from seqtrain.runtime.measures import Measures, peak_bytes
from seqtrain.runtime.metrics import MetricsFile
from seqtrain.runtime.pulse import STARTING, Told
from seqtrain.runtime.ranks import Ranks, check_health, is_lost_peer, keeps_host_order
from seqtrain.runtime.restoring import Restoration
from seqtrain.runtime.resume import NO_LORA, check_fits, fingerprint, put_off, refuse_lost_checkpoints
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.sample import sample
from seqtrain.runtime.saving import Saver
from seqtrain.runtime.schedule import CONSTANT, NORMS, plateau, refine
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.step import TrainState, train_step
from seqtrain.runtime.task import Callback, Pretraining, Task
from seqtrain.runtime.tensor_parallel import divided_trainable

log = logging.getLogger("seqtrain.runtime")


@dataclass(frozen=True)
class Session:
    """One call of `run`: its settings, and what the process that started it tells the ranks."""

    config: PretrainConfig
    # Folder of the prepared corpus.
    corpus: Path
    # Tells the restarts of one call from later calls on the same folder.
    name: str
    # The driver's, in the run's folder.
    epoch: int
    # Run of Weights & Biases; empty without.
    tracking_id: str = ""
    # What `Corpus.content` says.
    content: dict[str, str] = field(default_factory=dict)
    task: Task = field(default_factory=Pretraining)
    callback: Callback = field(default_factory=Callback)
    # Gradient norms of another run that a refined schedule goes by.
    norms: tuple[float, ...] = ()
    # The driver's epoch in checkpoint.store, where there is one.
    store_epoch: int = 0

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output_dir), self.config.checkpoint.store)

    @property
    def lease(self) -> Lease:
        """The driver's."""
        folder, store = self.folder, None
        if self.config.checkpoint.store:
            store = Lease(folder.kept_epochs, self.store_epoch, self.name, driver=True)
        return Lease(folder.epochs, self.epoch, self.name, driver=True, store=store)

    # Found once: a task may read whole files for it, and every checkpoint asks.
    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which numbers come out; checkpoints made with other values are refused."""
        return fingerprint(self.config, self.content, self.norms) | self.task.fingerprint()


def train(session: Session, ranks: Ranks, *, poll: Callable[[], None] = lambda: None) -> None:
    """Trains to the last step, or until a stop is requested; writes metrics, checkpoints and the outcome.

    Every rank calls it with the same `session`, in a process group that is already formed. Continues from the newest
    whole checkpoint in the run's folder. `poll` is called after each line of metrics, and each segment of a step.
    Raises `CheckpointError` for a checkpoint that doesn't fit, `FencedError` when another start has taken over,
    `SeqtrainError` when too many steps in a row aren't finite. An error of a rank's own is left for the driver before
    it is raised.
    """
    parallel, state = session.config.parallel, None
    lease = ranks.from_first(succeed(session.lease) if ranks.first else None)
    products.use(session.config.kernels.linear)
    ranks.pulse.enter(STARTING)
    if ranks.device.type == "cuda":
        node_cache.share(nodes=len(set(ranks.gather(socket.gethostname()))))
    try:
        check_health(ranks)
        with (
            lease.renewed() if ranks.first else nullcontext(),
            form_mesh(
                ranks.group,
                sequence=parallel.sequence,
                experts=parallel.experts,
                tensor=parallel.tensor,
                shard=parallel.shard_ranks,
                algorithm=parallel.algorithm,
                in_line=not parallel.overlaps(ordered=keeps_host_order(ranks.device)),
                device=ranks.device,
                timeout_seconds=session.config.runtime.collective_timeout_seconds,
            ) as mesh,
        ):
            with paused():
                state = _restore(session, ranks, mesh, lease, poll)
            try:
                with state.read.running(), state.verification.running():
                    _train_on(session, state)
            except BaseException as error:
                # Who is interrupted waits for nothing.
                state.saver.close(lost=is_lost_peer(error) or not isinstance(error, Exception))
                raise
    except Exception as error:
        if not is_lost_peer(error):
            leave_error(lease, ranks.rank, error, step=state.progress.step if state else -1)
        raise


def leave_error(lease: Lease, rank: int, error: Exception, *, step: int) -> None:
    """Writes error.json for the driver. The first rank to fail is the one that counts."""
    text = "".join(traceback.format_exception(error))
    # Where another start has taken over, nobody would read it.
    if lease.own.path.is_dir():
        of_user, kind = isinstance(error, SeqtrainError), type(error).__name__
        left = {
            "rank": rank,
            "kind": kind,
            "of_user": of_user,
            "line": one_line(error),
            "step": step,
            "traceback": text,
        }
        # On a full disk there is no room for it; the error itself is what matters.
        with suppress(OSError):
            create_new(lease.own.error, json.dumps(left).encode())


def one_line(error: BaseException) -> str:
    """What it says, in one line; with its kind where it is not one for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SeqtrainError) else f"{type(error).__name__}: {text}"


def _train_on(session: Session, state: TrainState) -> None:
    def due(every: int) -> bool:
        return bool(every and step % every == 0)

    config, callback, scores, stopped = state.config, state.callback, None, False
    callback.begin(state)
    while state.progress.step < config.train.steps:
        state.verification.check()
        with callback.phase("step"):
            record = train_step(state)
        if record is None:
            stopped = True
            break
        step = state.progress.step
        if step == config.train.steps or due(config.evaluation.every):
            scores = _evaluate(state)
            record |= scores or {}
        if state.metrics:
            state.metrics.write(record)
        state.poll()
        _stop_after_nonfinite_steps(state)
        if state.save_due or due(config.checkpoint.every) or _kept_for_good(config, step):
            _save(session, state)
    if scores is None and not stopped:
        # The run was stopped after its last step and before it was scored.
        scores = _evaluate(state)
        stopped = scores is None
    if not stopped:
        _verify_what_was_read(state)
    _save(session, state)
    _write_outcome(state, stopped=stopped, scores=scores)
    if not stopped:
        callback.end()


def _verify_what_was_read(state: TrainState) -> None:
    """No run ends on data that nobody has verified: what the ranks' threads didn't come to, they share out now."""
    verification, ranks = state.verification, state.ranks
    if not state.trainable.to_verify:
        return
    told = np.bitwise_or.reduce(ranks.gather(np.packbits(verification.state, axis=1)))
    touched, right = np.unpackbits(told, axis=1, count=verification.state.shape[1])
    left = np.flatnonzero(touched > right)
    for first in range(ranks.rank, len(left) + ranks.rank, ranks.count):
        verification.verify(left[first : first + 1])
        verification.check()
        # So that none waits longer for the others than one shard takes.
        ranks.sum(0.0)


def _evaluate(state: TrainState) -> Scores | None:
    with state.callback.phase("evaluation"), state.engine.averaged():
        return evaluate(state)


def _kept_for_good(config: PretrainConfig, step: int) -> bool:
    """Whether the checkpoint of `step` stays: as asked for, or as a decay begins, where a longer run goes on from."""
    every, rates = config.checkpoint.keep_every, config.schedule
    if every and step % every == 0:
        return True
    return rates.name in CONSTANT and step == plateau(rates, config.train.steps)[1]


def _stop_after_nonfinite_steps(state: TrainState) -> None:
    in_a_row, allowed = state.progress.skipped_in_a_row, state.config.train.max_nonfinite_steps
    if in_a_row > allowed:
        raise SeqtrainError(
            f"train.max_nonfinite_steps={allowed}: {in_a_row} steps in a row, up to step {state.progress.step}, had a "
            "loss or gradient that isn't finite; lower optimizer.lr, or resume from an earlier checkpoint"
        )


def _restore(session: Session, ranks: Ranks, mesh: Mesh, lease: Lease, poll: Callable[[], None]) -> TrainState:
    """Builds the model and its engine as they were at the newest whole checkpoint, or new, and opens the data."""
    found = _candidates(session) if ranks.first else None
    while True:
        checkpoint = ranks.from_first(next(found, None) if found else None)
        try:
            return _restore_from(checkpoint, session, ranks, mesh, lease, poll)
        except DamagedError as error:
            # Of one that was named, there is none before.
            if checkpoint is None or checkpoint.folder.parent != session.folder.checkpoints:
                raise
            if ranks.first:
                log.warning("%s; trying the checkpoint before", error)
        # What was made until the damage was found.
        gc.collect()


def _restore_from(
    found: Checkpoint | None, session: Session, ranks: Ranks, mesh: Mesh, lease: Lease, poll: Callable[[], None]
) -> TrainState:
    config, folder = session.config, session.folder
    torch.manual_seed(config.seed)
    trainable = session.task.build(config, session.corpus)
    weights, restoration = trainable.first_weights, None
    if found:
        restoration = Restoration(found, ranks, mesh.shards.replicas if mesh.shards else None)
        weights = restoration.weights(trainable.model, frozen=trainable.frozen, others=weights)
    # Counted now: in ZeRO 3 a rank will hold only its part of each.
    parameters = sum(p.numel() for p in trainable.model.parameters())
    trained = sum(p.numel() for p in trainable.model.parameters() if p.requires_grad)
    length = config.train.sequence_length
    flops = trainable.model.flops(length) / length if isinstance(trainable.model, LanguageModel) else 0.0
    divided = None
    if mesh.tensor.count > 1:
        trainable, divided = divided_trainable(trainable, mesh)
    engine = Engine(trainable.model, trainable.groups, config, ranks, weights=weights, mesh=mesh, divided=divided)
    if found and restoration:
        if found.progress.taken:
            engine.optimizer_state.restore(restoration, steps_taken=found.progress.taken)
        restoration.agree()
        log.info("checkpoint: %s, of which rank %d has read %d bytes", found.folder, ranks.rank, restoration.bytes)
    progress = found.progress if found else Progress()
    if ranks.first:
        log.info(
            "training: from step %d of %d, %s", progress.step, config.train.steps, found.folder if found else "new"
        )
    metrics = _begin_records(session, ranks, lease, step=progress.step) if ranks.first else None
    # After that line was written, which counts this start.
    clock = save_clock(config, folder, session.name)
    saver = Saver(
        folder.checkpoints,
        ranks,
        lease,
        keep=config.checkpoint.keep,
        for_good=partial(_kept_for_good, config),
        copy_records=folder.copy_out,
    )
    clock.busy = lambda: saver.busy
    return TrainState(
        config=config,
        saver=saver,
        lease=lease,
        stop=session.lease.own.stop,
        ranks=ranks,
        mesh=mesh,
        engine=engine,
        experts=Experts(engine.module, mesh, ranks.device),
        measures=Measures(config, engine, ranks, trained=trained / parameters, flops=flops, sources=trainable.sources),
        trainable=trainable,
        callback=Told(session.callback, ranks.pulse),
        progress=progress,
        metrics=metrics,
        poll=poll,
        parameters=parameters,
        trained=trained,
        saved_step=progress.step if found and found.folder.parent == folder.checkpoints else -1,
        clock=clock,
        refined=refine(session.norms, config.train.steps, power=NORMS[config.schedule.norm][1]),
    )


def _begin_records(session: Session, ranks: Ranks, lease: Lease, *, step: int) -> MetricsFile:
    """Notes this start, from `step` on, and opens the metrics: the first rank's part."""
    start = {"session": session.name, "epoch": lease.epoch, "step": step, "ranks": ranks.count, "time": time.time()}
    metrics = MetricsFile(session.folder.metrics, lease, step=step)
    with session.folder.starts.open("a") as file:
        file.write(json.dumps(start) + "\n")
    return metrics


def _candidates(session: Session) -> Iterator[Checkpoint | None]:
    """The checkpoints to resume from, if the one before is damaged: the run's own, else that `checkpoint.resume` names.

    Last, None: there was none, and the run starts from its beginning.
    """
    resume, now = session.config.checkpoint.resume, session.fingerprint
    passed_over = []
    for own in checkpoints.candidates(session.folder.checkpoints):
        if put_off(own, now):
            passed_over.append(own)
            continue
        check_fits(own.folder, own.manifest.trajectory, now, steps_done=own.progress.step)
        yield own
    for own in passed_over:
        check_fits(own.folder, own.manifest.trajectory, now, steps_done=own.progress.step)
        yield own
    refuse_lost_checkpoints(session.folder)
    if resume in ("auto", "never"):
        yield None
        return
    # The weights must fit; steps, data and learning rate may be new ones.
    other = checkpoints.read(place(resume))
    before = other.manifest.trajectory
    for part in ("model", "mixer", "lora"):
        check_fits(other.folder, {part: before.get(part, NO_LORA)}, {part: now[part]})
    # So must the optimizer's state.
    names = [{"optimizer": {"name": each["optimizer"]["name"]}} for each in (before, now)]
    check_fits(other.folder, *names)
    yield other


def _save(session: Session, state: TrainState) -> None:
    """Begins to write a checkpoint, unless this step has one."""
    step = state.progress.step
    if step == state.saved_step:
        return
    if state.metrics:
        # Its steps are told of before it is there.
        state.metrics.flush()
    began = time.perf_counter()
    with state.callback.phase("checkpoint"):
        state.saver.save(
            state.engine,
            state.progress,
            fingerprint=session.fingerprint,
            tracking_id=session.tracking_id,
            frozen=state.trainable.frozen,
        )
    state.clock.saved(time.perf_counter() - began)
    state.saved_step = step


def _write_outcome(state: TrainState, *, stopped: bool, scores: Scores | None) -> None:
    """Writes outcome.json for the driver: what only the ranks know."""
    peak = state.ranks.largest(peak_bytes(state.ranks.device))
    # Who was stopped has little time left.
    text = "" if stopped else sample(state)
    state.saver.wait()
    if not state.metrics:
        return
    state.metrics.close()
    state.poll()
    outcome = {
        "stopped": stopped,
        "steps": state.progress.step,
        "parameters": state.parameters,
        "trained_parameters": state.trained,
        "skipped_steps": state.progress.skipped,
        "total_tokens": state.progress.tokens,
        "peak_memory_bytes": int(peak),
        "held_out_bits_per_byte": None,
        "sample": text,
    } | (scores or {})
    replace_file(state.lease.own.outcome, json.dumps(outcome).encode())
