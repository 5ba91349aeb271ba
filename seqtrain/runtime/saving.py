"""Writing checkpoints while training goes on: each rank its own slices, from a copy, in a thread.

A save takes as long as the copy to the memory of the machine. A thread then writes and hashes it, and leaves a note
beside its file; rank 0's thread waits for the notes of all, creates the manifest and drops what is too old. What goes
wrong there is told to all ranks at the start of the next step.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from seqtrain.errors import CheckpointError, SeqtrainError
from seqtrain.files import make_folder, read_json, replace_file, sync
from seqtrain.runtime.checkpoint import (
    FORMAT,
    CheckpointManifest,
    FileEntry,
    Progress,
    clear,
    commit,
    digest,
    drop_oldest,
    folder_of,
    versions,
)
from seqtrain.runtime.engine import Engine
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.slices import Contents, contents_of, named, write_slices

log = logging.getLogger("seqtrain.runtime")

# Seconds between two looks at what another rank has come to: at first, and at most.
LOOK, RARE = 0.01, 1.0
# Seconds that a run which ends by an error leaves its last save.
LAST_SECONDS = 60.0
# Bytes: where a tensor begins in memory; written at once (S3 takes 10,000 parts of a file, each of 5 MB or more).
ALIGNED, BUFFER = 16, 2**24


class Abandoned(Exception):
    """The run ends, and nobody waits for the save any more."""


class Saver:
    """Saves a run's checkpoints below `root`, one after the other. Every rank has one.

    `keep`: newest that stay. `for_good`: whether that of a step stays for ever. `copy_records`: called on rank 0 before
    each commit, copies the run's records to where its checkpoints are.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks,
        lease: Lease,
        *,
        keep: int,
        for_good: Callable[[int], bool],
        copy_records: Callable[[], None] = lambda: None,
    ):
        self._root, self._ranks, self._lease = root, ranks, lease
        self._keep, self._for_good, self._copy_records = keep, for_good, copy_records
        self._thread: threading.Thread | None = None
        self._error: SeqtrainError | None = None
        self._abandoned = threading.Event()
        self._memory = torch.empty(0, dtype=torch.uint8)
        # Seconds that training has stood still for saves, and that they were being written.
        self.blocked = self.writing = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save of this rank's has failed; all must learn of it, and call `wait`."""
        return self._error is not None

    def save(
        self,
        engine: Engine,
        progress: Progress,
        *,
        fingerprint: dict[str, Any],
        tracking_id: str,
        frozen: Collection[str] = (),
    ) -> None:
        """Copies what this rank writes of a checkpoint, and has it written. All ranks call it.

        `frozen`: names of weights that it does not hold. Raises as `wait`, of the save before.
        """
        began = time.perf_counter()
        self.wait()
        pieces = list(engine.pieces(besides=frozen, moments=progress.taken > 0))
        states = dict(engine.optimizer_state.states()) if progress.taken else {}
        contents = contents_of(pieces, states)
        tensors = self._copied(dict(named(pieces)) | states)
        manifest = CheckpointManifest(
            FORMAT,
            progress,
            tracking_id,
            digest(fingerprint),
            fingerprint,
            files={},
            sha256="",
            epoch=self._lease.of_checkpoints.epoch,
            versions=versions(),
            shapes=engine.shapes(besides=frozen),
            numbers=engine.optimizer_state.numbers() if progress.taken else {},
        )
        self._thread = threading.Thread(
            target=self._work, args=(manifest, tensors, contents), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.blocked += time.perf_counter() - began

    def wait(self) -> None:
        """Returns when the last save is a checkpoint. A collective.

        Raises on every rank: `CheckpointError` where one could not write, `FencedError` where another start has taken
        over.
        """
        if self._thread is None:
            return
        while True:
            self._thread.join(RARE)
            everyone = self._ranks.gather((self.busy, self._error))
            for _, error in everyone:
                if error is not None:
                    self._abandoned.set()
                    raise error
            if not any(busy for busy, _ in everyone):
                self._thread = None
                return

    def close(self, *, lost: bool) -> None:
        """Ends what is being written where a run ends by an error; `lost`: of another rank's, so that none can end."""
        if self._thread is not None and not lost:
            self._thread.join(LAST_SECONDS)
        self._abandoned.set()

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in this process's memory, which is kept from save to save, and pinned where they come from a GPU."""
        sizes = [-(-each.numel() * each.element_size() // ALIGNED) * ALIGNED for each in tensors.values()]
        cuda = any(each.is_cuda for each in tensors.values())
        if len(self._memory) < sum(sizes):
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=cuda)
        found, at = {}, 0
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            raw = self._memory[at : at + tensor.numel() * tensor.element_size()]
            found[name] = raw.view(tensor.dtype).view(tensor.shape)
            found[name].copy_(tensor.detach(), non_blocking=True)
            at += size
        if cuda:
            torch.cuda.synchronize()
        return found

    def _work(self, manifest: CheckpointManifest, tensors: Mapping[str, Tensor], contents: Contents) -> None:
        folder, began = folder_of(self._root, manifest.progress.step), time.perf_counter()
        try:
            if self._ranks.first:
                clear(self._root, self._lease, step=manifest.progress.step)
            make_folder(folder)
            self._write(folder, tensors, contents)
            if self._ranks.first:
                self._commit(manifest, folder)
                drop_oldest(self._root, self._lease, keep=self._keep, for_good=self._for_good)
                log.info("checkpoint: %s, written in %.1f s", folder, time.perf_counter() - began)
        except Abandoned:
            log.warning("%s: was not finished", folder)
        except SeqtrainError as error:
            self._error = error
        # Whatever ends a thread, the ranks must hear of it.
        except Exception as error:
            log.info("what a save ended with", exc_info=True)
            said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            self._error = CheckpointError(
                f"{folder}: can't be written: rank {self._ranks.rank}: {said}; older checkpoints are untouched"
            )
        finally:
            self.writing += time.perf_counter() - began

    def _write(self, folder: Path, tensors: Mapping[str, Tensor], contents: Contents) -> None:
        """This rank's slices, and the note that they are whole."""
        path = self._file(folder, self._ranks.rank, "safetensors")
        with path.open("wb", buffering=BUFFER) as out:
            sha256 = write_slices(out, tensors, self._go_on)
        sync(path)
        entry = FileEntry(path.stat().st_size, sha256)
        note = {"entry": asdict(entry), "contents": asdict(contents)}
        replace_file(self._file(folder, self._ranks.rank, "json"), json.dumps(note).encode())

    def _commit(self, manifest: CheckpointManifest, folder: Path) -> None:
        """Makes it a checkpoint, when all ranks have written."""
        for rank in range(self._ranks.count):
            note, pause = self._file(folder, rank, "json"), LOOK
            while not note.exists():
                self._go_on()
                self._abandoned.wait(pause)
                pause = min(2 * pause, RARE)
            told, file = read_json(note), self._file(folder, rank, "safetensors").name
            manifest.files[file] = FileEntry(**told["entry"])
            manifest.contents[file] = TypeAdapter(Contents).validate_python(told["contents"])
        self._copy_records()
        commit(manifest, folder, self._lease)

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned

    def _file(self, folder: Path, rank: int, kind: str) -> Path:
        return folder / f"rank-{rank:05d}.{self._lease.of_checkpoints.epoch}.{kind}"
