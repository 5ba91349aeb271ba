"""The folder of a run: what lies where, and what is logged there."""

import json
import logging
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seqtrain.errors import LOGGER, CheckpointError
from seqtrain.files import place, read_record, replace_file

# Bytes of the lines of a run.
LARGEST_LOG = 2**32


class RunFolder:
    """Paths below `output_dir`. `store`: where its checkpoints are in place of it, a name as of `files.place`."""

    def __init__(self, path: Path, store: str = ""):
        self.path = path
        # Where checkpoints are, and copies of the run's records.
        self.kept = place(store) if store else path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = self.kept / "checkpoints"
        self.summary = path / "summary.json"
        self.loss_curve = path / "loss.png"
        # What was measured of the run's parts.
        self.figures = path / "figures.png"
        # The gradient norms of another run that the learning rate follows.
        self.schedule = path / "schedule.json"
        self.log = path / "run.log"
        # One line each time the ranks began to train, with the step they began at.
        self.starts = path / "starts.jsonl"
        # Who may write here, and what the processes of a start tell each other: see `runtime.lease`.
        self.epochs = path / ".epochs"
        # Of who may write checkpoints.
        self.kept_epochs = self.kept / ".epochs"
        # As files were when they were copied to the store: bytes, and nanoseconds since 1970.
        self._copied: dict[Path, tuple[int, int]] = {}

    def copy_out(self) -> None:
        """Copies the run's records that have changed to the store, where there is one."""
        if self.kept is self.path:
            return
        for file in self.path.rglob("*"):
            within = file.relative_to(self.path)
            skipped = within.parts[0] in (self.epochs.name, self.checkpoints.name)
            if skipped or within.name.endswith(".partial") or not file.is_file():
                continue
            told = file.stat()
            stamp = told.st_size, told.st_mtime_ns
            if self._copied.get(file) != stamp:
                replace_file(self.kept.joinpath(*within.parts), file.read_bytes())
                self._copied[file] = stamp

    def copy_back(self) -> None:
        """Copies the records of a run that the store has into a folder that has none."""
        if self.kept is self.path or self.config.exists() or not (self.kept / self.config.name).exists():
            return
        for file in (self.config, self.metrics, self.starts, self.schedule, self.summary):
            kept = self.kept / file.name
            if kept.exists():
                replace_file(file, kept.read_bytes())


def plain(value: Any) -> Any:
    """`value`, a config dataclass or a dict of them, as dicts, lists and scalars; `from` for the field `from_`."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    typed = asdict(value, dict_factory=lambda items: {key.rstrip("_"): item for key, item in items})
    return json.loads(json.dumps(typed))


def as_record(line: bytes) -> dict[str, Any] | None:
    """What `line` says of a step; None where it says nothing that can be read."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record in `path`, in order; none if there is no such file."""
    if not path.exists():
        return []
    try:
        lines = read_record(path, limit=LARGEST_LOG).splitlines(keepends=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; put it back, or move it away") from None
    return [record for line in lines if line.endswith(b"\n") and (record := as_record(line)) is not None]


class _LogFile(logging.FileHandler):
    """What a full disk has no room for is lost, and said by what ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def log_to(file: Path) -> None:
    """Appends everything the logger `seqtrain` and its children say to `file`; replaces an earlier file."""
    for handler in [h for h in LOGGER.handlers if isinstance(h, logging.FileHandler)]:
        LOGGER.removeHandler(handler)
        handler.close()
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


def warn_on_stderr() -> None:
    """Shows warnings of `seqtrain` on stderr, one line each, unless someone has set up a handler for it already."""
    if any(isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler) for h in LOGGER.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
