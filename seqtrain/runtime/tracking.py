"""Weights & Biases: one run across all restarts, kept by the process that started the ranks."""

import logging
import uuid
from types import TracebackType
from typing import Any

from seqtrain.errors import CheckpointError
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.metrics import Record
from seqtrain.runtime.run_folder import RunFolder, plain
from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")


def tracking_id(config: PretrainConfig, folder: RunFolder) -> str:
    """The run's id at Weights & Biases: the newest checkpoint's, or a new one; empty when tracking is disabled."""
    if config.tracking.mode == "disabled":
        return ""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True):
        try:
            return checkpoints.read_manifest(path).tracking_id or _new_id()
        except CheckpointError:
            continue
    return _new_id()


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


class Tracker:
    """Sends records to Weights & Biases; does nothing when tracking is disabled. A context manager."""

    def __init__(self, config: PretrainConfig, folder: RunFolder, *, run_id: str):
        self._run: Any = None
        if config.tracking.mode == "disabled":
            return
        import wandb

        mode = _possible_mode(config.tracking.mode)
        # Files of a run lie below its folder, not in the directory the program was started in.
        self._run = wandb.init(
            id=run_id,
            project=config.tracking.project,
            name=config.tracking.name or folder.path.name,
            dir=str(folder.path),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=plain(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        log.info("tracking: wandb %s, run %s", mode, run_id)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run:
            self._run.finish(exit_code=int(error is not None))

    def show(self, record: Record) -> None:
        """Logs a record. `step` is one of its fields: an offline run that is resumed counts its own steps from 0."""
        if self._run:
            self._run.log(record)

    def summarize(self, summary: Record) -> None:
        """Keeps the figures of the whole run."""
        if self._run:
            self._run.summary.update(summary)


def _possible_mode(mode: str) -> Any:
    """`offline` in place of `online` where no API key is found, with a warning."""
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        log.warning(
            "tracking.mode=online: no API key (see `wandb login`), so the run is kept below output_dir, offline"
        )
        return "offline"
    return mode
