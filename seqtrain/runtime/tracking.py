"""Weights & Biases and TensorBoard: one run across all restarts, kept by the process that started the ranks."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.metrics import Record
from seqtrain.runtime.run_folder import RunFolder, plain
from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")


def tracking_id(config: PretrainConfig, folder: RunFolder) -> str:
    """The run's id at Weights & Biases: the newest checkpoint's, or a new one; empty when tracking is disabled."""
    if config.tracking.mode == "disabled":
        return ""
    newest = checkpoints.latest(folder.checkpoints)
    return (newest and newest.manifest.tracking_id) or uuid.uuid4().hex[:8]


@contextmanager
def tracked(config: PretrainConfig, folder: RunFolder, *, run_id: str) -> Iterator[list[Any]]:
    """What records go to until the block ends: `log(record)` takes one, `summary.update(values)` those of the run."""
    with ExitStack() as opened:
        trackers = []
        if config.tracking.mode != "disabled":
            trackers.append(opened.enter_context(_wandb(config, folder, run_id)))
        if config.tracking.tensorboard:
            trackers.append(opened.enter_context(closing(TensorBoard(folder.path / "tensorboard"))))
        yield trackers


@contextmanager
def _wandb(config: PretrainConfig, folder: RunFolder, run_id: str) -> Iterator[Any]:
    import wandb

    mode = config.tracking.mode
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        log.warning(
            "tracking.mode=online: no API key (see `wandb login`), so the run is kept below output_dir, offline"
        )
        mode = "offline"
    # Files of a run lie below its folder, not in the directory the program was started in.
    run = wandb.init(
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
    with ExitStack() as failed:
        failed.callback(run.finish, exit_code=1)
        yield run
        failed.pop_all()
    run.finish(exit_code=0)


class TensorBoard:
    """Files for TensorBoard in `folder`: every number of a record, against the steps."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.summary: dict[str, Any] = {}
        self._writer: Any = None

    def log(self, record: Record) -> None:
        """Writes the numbers of a record. What an earlier session wrote of the first step and later ones is void."""
        step = record["step"]
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
