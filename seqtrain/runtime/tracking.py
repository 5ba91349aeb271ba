"""Weights & Biases: one run across all restarts, kept by the process that started the ranks."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from seqtrain.errors import CheckpointError
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.run_folder import RunFolder, plain
from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")


def tracking_id(config: PretrainConfig, folder: RunFolder) -> str:
    """The run's id at Weights & Biases: the newest checkpoint's, or a new one; empty when tracking is disabled."""
    if config.tracking.mode == "disabled":
        return ""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True):
        try:
            if found := checkpoints.read_manifest(path).tracking_id:
                return found
            break
        except CheckpointError:
            continue
    return uuid.uuid4().hex[:8]


@contextmanager
def tracked(config: PretrainConfig, folder: RunFolder, *, run_id: str) -> Iterator[Any]:
    """The run at Weights & Biases that records and the summary go to, until the block ends; None without tracking."""
    if config.tracking.mode == "disabled":
        yield None
        return
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
