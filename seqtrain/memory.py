"""How much memory this process has held."""

import resource
import sys
import threading
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
