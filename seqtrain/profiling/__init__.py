"""Where a training step's time and memory go, measured while it runs."""

from seqtrain.profiling.profiler import ProfileConfig, Profiler, spread
from seqtrain.profiling.report import StepWork, by_kind, read_profiles, summarize, trace_events

__all__ = ["ProfileConfig", "Profiler", "StepWork", "by_kind", "read_profiles", "spread", "summarize", "trace_events"]
