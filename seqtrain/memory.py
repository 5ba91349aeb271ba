"""How much memory this process has held."""

import resource
import sys
from pathlib import Path


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
