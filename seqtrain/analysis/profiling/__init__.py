"""Where a training step's time and memory go, measured while it runs."""

from seqtrain.analysis.profiling.profiler import ProfileConfig, Profiler, spread
from seqtrain.analysis.profiling.report import StepWork, by_kind, read_profiles, summarize, trace_events

__all__ = ["ProfileConfig", "Profiler", "StepWork", "by_kind", "read_profiles", "spread", "summarize", "trace_events"]
