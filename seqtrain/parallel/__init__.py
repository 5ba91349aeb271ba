"""One sequence over many ranks: All-Scan and what carries it."""

from seqtrain.parallel.checkpointing import checkpoint_contexts, save_scans
from seqtrain.parallel.scan import (
    Algorithm,
    Scan,
    all_scan,
    flush_scans,
    open_all_scan,
    scans_opened,
    start_all_scan,
)
from seqtrain.parallel.schedules import ALGORITHMS
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sharded import ShardedSequence

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Scan",
    "SequenceContext",
    "ShardedSequence",
    "all_scan",
    "checkpoint_contexts",
    "flush_scans",
    "open_all_scan",
    "save_scans",
    "scans_opened",
    "start_all_scan",
]
