"""One sequence over many ranks: All-Scan and what carries it."""

from seqtrain.parallel.all_scan import (
    ALGORITHMS,
    Algorithm,
    OpenScan,
    Scan,
    all_scan,
    checkpoint_contexts,
    flush_scans,
    open_all_scan,
    save_scans,
    scans_opened,
    start_all_scan,
)

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "OpenScan",
    "Scan",
    "all_scan",
    "checkpoint_contexts",
    "flush_scans",
    "open_all_scan",
    "save_scans",
    "scans_opened",
    "start_all_scan",
]
