"""Triton's compiled kernels where several ranks run: a node has its own, and compiles each once.

A home folder is often one file system for all nodes: thousands of ranks would look for files there at once, and the
eight of a node compile the same kernel at the same time.
"""

import hashlib
import importlib.util
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger("seqtrain.kernels")

# Seconds after which a rank compiles a kernel itself that another has not finished.
PATIENCE = 300.0
# What users set to choose the place themselves.
CHOSEN = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_MANAGER")


def share(*, nodes: int) -> None:
    """To be called by each rank before its first kernel; does nothing without Triton, or where a folder is not safe.

    With several `nodes` the cache lies in the node's temporary folder, unless the environment names a place.
    """
    if not importlib.util.find_spec("triton") or (folder := _private_folder()) is None:
        return
    if nodes > 1 and not any(name in os.environ for name in CHOSEN):
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    from triton import knobs

    if knobs.runtime.jit_cache_hook is None and knobs.runtime.jit_post_compile_hook is None:
        turns = Turns(folder / "locks")
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = turns.wait, turns.done


def _private_folder() -> Path | None:
    """A folder of this user and machine that nobody else can write: what lies in it is run."""
    folder = Path(tempfile.gettempdir()) / f"seqtrain-triton-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    log.warning("%s: is not this user's alone, so Triton's kernels are kept where Triton keeps them", folder)
    return None


class Turns:
    """Processes that come to the same kernel take turns: who comes later finds what the first has compiled.

    Triton calls `wait` before it looks into its cache, and `done` after it has compiled.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._held: dict[str, FileLock] = {}

    def wait(self, *, key: Any, repr: str, fn: Any, **_: Any) -> bool:
        """Takes the kernel's lock; False lets Triton go on."""
        name = hashlib.sha256(f"{fn.module}.{repr}".encode()).hexdigest()
        self._folder.mkdir(exist_ok=True)
        lock = FileLock(self._folder / name)
        # Another that failed to compile holds it until it ends.
        with suppress(Timeout):
            lock.acquire(timeout=PATIENCE)
            self._held[str(key)] = lock
        return False

    def done(self, *, key: Any, **_: Any) -> bool:
        """Lets go of it."""
        if lock := self._held.pop(str(key), None):
            lock.release()
        return False
