"""Real training steps of a layout in processes of their own: seconds per step and the most memory any rank held."""

import contextlib
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from seqtrain.data import prepare
from seqtrain.memory import peak_resident_bytes
from seqtrain.parallel.testing import run_ranks
from seqtrain.planning.run_config import read_run
from seqtrain.runtime.lease import take
from seqtrain.runtime.ranks import this_process
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.runtime.worker import Session, train

# Ranks are forked from a process that has imported what each would import for itself, and has done nothing else: blocks
# once freed change where the C library puts later ones, in children too, and a run's ranks begin without any.
FRESH = get_context("forkserver")
FRESH.set_forkserver_preload(
    ["deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx", "seqtrain.runtime.worker"]
)

# Keys of runs that measure and keep nothing; sequences of one document, as the counts take them.
QUIET = (
    *("experiment=quickstart", "runtime=inline", "runtime.cpus_per_worker=1", "tracking.mode=disabled"),
    *("checkpoint.every=0", "evaluation.every=0", "sample.tokens=0", "data.reset_at_documents=false"),
)


@dataclass(frozen=True)
class Measured:
    """What a layout took: the median of its steps but the first, the least, and bytes of the fullest rank: before the
    first step, after it, and after the last.
    """

    seconds: float
    least_seconds: float
    start_bytes: int
    first_bytes: int
    peak_bytes: int


class Done(Exception):
    """Stops the run after the requested steps."""


def measure_layout(overrides: list[str], *, steps: int, limit: float = 600.0) -> Measured:
    """Trains `steps` steps, the first of which is warm-up, on ranks of one thread each, and says what it took.

    Raises `ConfigError` for wrong keys, `RankError` for ranks that failed or did not end within `limit` seconds.
    """
    # For DeepSpeed, which the server of forks imports.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    config = read_run([*QUIET, *overrides])
    # A step more than wanted: the last one would be followed by an evaluation.
    config = replace(config, train=replace(config.train, steps=steps + 1))
    corpus = prepare(config.data)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=folder)
        lease = take(RunFolder(Path(folder)).epochs, "layout", seconds=config.runtime.lease_seconds)
        session = Session(config, corpus.folder.resolve(), "layout", lease.epoch)
        with ProcessPoolExecutor(1, mp_context=FRESH) as fresh:
            rows = fresh.submit(_run, session, steps, limit).result()
        seconds = [record["step_seconds"] for record in read_lines(RunFolder(Path(folder)).metrics)]
    later = seconds[1:] or seconds
    start, first, last = (max(column) for column in zip(*rows, strict=True))
    return Measured(statistics.median(later), min(later), start, first, last)


def _run(session: Session, steps: int, limit: float) -> list[tuple[int, int, int]]:
    """By rank, the most bytes held before the first step, after it, and after the last."""

    def rank(_: int) -> tuple[int, int, int]:
        torch.set_num_threads(1)
        seen: list[int] = []

        def poll() -> None:
            seen.append(peak_resident_bytes())
            if len(seen) == steps:
                raise Done

        before = peak_resident_bytes()
        with contextlib.suppress(Done):
            train(session, this_process(torch.device("cpu")), poll=poll)
        return before, seen[0], seen[-1]

    return run_ranks(session.config.parallel.ranks, rank, limit=limit, group_timeout=limit)
