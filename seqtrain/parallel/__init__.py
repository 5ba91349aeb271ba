"""One sequence over many ranks: All-Scan and what carries it."""

# The first two say how their operators are split.
from seqtrain.parallel import attention, relay
from seqtrain.parallel.scan import (
    Algorithm,
    Scan,
    all_scan,
    checkpoint_contexts,
    flush_scans,
    open_all_scan,
    save_scans,
    scans_opened,
)
from seqtrain.parallel.schedules import ALGORITHMS
from seqtrain.parallel.sequence import ContinuedSequence, SequenceContext
from seqtrain.parallel.sharded import ShardedSequence

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "ContinuedSequence",
    "Scan",
    "SequenceContext",
    "ShardedSequence",
    "all_scan",
    "attention",
    "checkpoint_contexts",
    "flush_scans",
    "open_all_scan",
    "relay",
    "save_scans",
    "scans_opened",
]
