"""How much memory this process has held."""

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType


def peak_resident_bytes() -> int:
    """Most memory that was resident at one time since this program started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, which on Linux counts what the parent held when it forked this process, too.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: mapped weights do not count. 0 where the system can't tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class AnonymousPeak:
    """The most `anonymous_bytes` seen inside a `with`, above those at its start, as `bytes`; looked at often."""

    # Seconds between looks, each of about 30 microseconds.
    INTERVAL = 0.002

    def __enter__(self) -> "AnonymousPeak":
        self.bytes = 0
        self._start = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)
            if self._done.wait(self.INTERVAL):
                return


# glibc's numbers of two settings in <malloc.h>, and what people set them by.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
# Larger blocks the C library gets from the system each time (glibc's DEFAULT_MMAP_THRESHOLD_MAX).
MAPPED_ABOVE = 32 << 20


@contextmanager
def large_tensors_given_back(least: int = 1 << 20) -> Iterator[None]:
    """In it, memory of `least` bytes and more goes back to the system when it is freed, rather than into holes.

    For a start, in which much is made once and dropped: afterwards freed memory is kept for the next step, as always.
    Without glibc, and where the environment says how it is to be, nothing changes.
    """
    glibc = _glibc()
    if glibc is None or any(name in os.environ for name in SETTINGS):
        yield
        return
    glibc.mallopt(M_MMAP_THRESHOLD, least)
    try:
        yield
    finally:
        glibc.mallopt(M_MMAP_THRESHOLD, MAPPED_ABOVE)
        glibc.mallopt(M_TRIM_THRESHOLD, 2 * MAPPED_ABOVE)
        give_back_free_memory()


def give_back_free_memory() -> None:
    """Gives freed memory that the process still holds back to the system, where that is glibc's."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "malloc_trim") else None
