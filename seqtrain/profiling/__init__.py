"""Where a training step's time and memory go, measured while it runs."""

from seqtrain.profiling.profiler import ProfileConfig, Profiler
from seqtrain.profiling.report import StepWork, by_kind, read_profiles, summarize, trace_events
from seqtrain.report import spread

__all__ = ["ProfileConfig", "Profiler", "StepWork", "by_kind", "read_profiles", "spread", "summarize", "trace_events"]
