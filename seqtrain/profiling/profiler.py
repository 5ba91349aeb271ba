"""The callback of a profiled run: which steps are measured and how, and what every rank has measured."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from seqtrain.profiling.communication import COMMUNICATION, InFlight, replaced, timed, watched_communication
from seqtrain.profiling.memory import CudaMeter, MemoryReading, MemoryTimeline, ResidentMeter
from seqtrain.profiling.modules import watched_model
from seqtrain.profiling.parts import (
    BACKWARD,
    CudaClock,
    HostClock,
    Part,
    Span,
    Timeline,
    hidden_seconds,
    seconds_by_part,
)
from seqtrain.runtime.engine import step_calls
from seqtrain.runtime.measures import matrix_flops
from seqtrain.runtime.task import Callback, Phase

Step = Literal["warm-up", "plain", "profiled", "memory"]
DATA = Part("data")
ENGINE_PARTS = {
    "optimizer": Part("optimizer"),
    # What the engine does with gradients besides autograd: scaling, ZeRO's buckets and partitions.
    "gradients": Part("gradients", BACKWARD),
    # Autograd outside the modules that are parts: the graph's ends, the sums where paths meet.
    "autograd": Part("other", BACKWARD),
}


@dataclass(frozen=True)
class ProfileConfig:
    """The keys under `profile.`"""

    # Steps that are profiled; as many are run without the profiler between them, and give the throughput.
    steps: Annotated[int, Field(gt=0)] = 5
    # Steps at the start that are discarded: they compile, fill caches and allocate.
    warmup: Annotated[int, Field(ge=0)] = 2
    # True: write trace.json, one timeline per rank, for Perfetto (ui.perfetto.dev).
    trace: bool = False
    # Seconds for which every rank multiplies matrices to find the peak; 0: no MFU.
    peak: Annotated[float, Field(ge=0)] = 0.5

    @property
    def total_steps(self) -> int:
        """Steps of the run: the last one is looked at for its memory, and not timed."""
        return self.warmup + 2 * self.steps + 1

    def plan(self) -> list[Step]:
        """What each step is for. With and without the profiler in turns, either as often the first of its pair."""
        pairs: list[list[Step]] = [["plain", "profiled"], ["profiled", "plain"]]
        measured = [step for number in range(self.steps) for step in pairs[number % 2]]
        return [*["warm-up"] * self.warmup, *measured, "memory"]  # type: ignore[list-item]


@dataclass
class RankProfile:
    """What one rank measured."""

    rank: int
    # Of the model.
    vocab_size: int = 0
    # Seconds of the steps of each kind, in order.
    steps: dict[str, list[float]] = field(default_factory=dict)
    # Seconds of the processor that this process used in them, all its threads together.
    processor: dict[str, list[float]] = field(default_factory=dict)
    # Seconds of each part in every profiled step; 0 where a step did not meet the part.
    parts: dict[Part, list[float]] = field(default_factory=dict)
    # Seconds of every profiled step in which something was in flight while the rank computed.
    hidden: list[float] = field(default_factory=list)
    # Seconds of each evaluation and each checkpoint.
    phases: dict[str, list[float]] = field(default_factory=dict)
    # Operations per second of a matrix product in the run's dtype, all ranks at once; 0: not measured.
    peak_flops: float = 0.0
    memory: MemoryReading | None = None
    # Of the last profiled step, seconds from when the ranks began together: what it did, what was in flight.
    spans: list[Span] = field(default_factory=list)
    in_flight: list[tuple[float, float]] = field(default_factory=list)


class Profiler(Callback):
    """The callback of a profiled run: one on each rank, the same settings on all.

    `path`: the JSON file into which the first rank writes what every rank has measured.
    """

    def __init__(self, config: ProfileConfig, path: Path) -> None:
        self.config = config
        self.path = path

    def begin(self, state: Any) -> None:
        self._state = state
        device = state.ranks.device
        cuda = device.type == "cuda"
        self._clock = CudaClock(device) if cuda else HostClock()
        self._meter = CudaMeter(device) if cuda else ResidentMeter()
        self._profile = RankProfile(state.ranks.rank, state.engine.module.vocab_size)
        self._plan = iter(self.config.plan())
        # Of the step that is under way, where that is looked into.
        self._timeline: Timeline | None = None
        state.ranks.gather(None)
        if self.config.peak:
            dtype = getattr(torch, state.config.train.dtype)
            self._profile.peak_flops = matrix_flops(device, dtype, seconds=self.config.peak)
        # The ranks leave this together, so that their clocks have one zero, as near as a message is fast.
        state.ranks.gather(None)
        [self._zero] = self._clock.seconds([self._clock.mark()])

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        if name == "step":
            with self._step(next(self._plan)):
                yield
        elif name == "data":
            with self._timeline.during(DATA) if self._timeline else nullcontext():
                yield
        else:
            began = time.perf_counter()
            yield
            self._profile.phases.setdefault(name, []).append(time.perf_counter() - began)

    def end(self) -> None:
        everyone = self._state.ranks.gather(self._profile)
        if self._state.ranks.first:
            self.path.write_text(json.dumps([plain_profile(profile) for profile in everyone]))

    @contextmanager
    def _step(self, kind: Step) -> Iterator[None]:
        measured: Callable = {"profiled": self._profiled, "memory": self._memory}.get(kind, nullcontext)
        times, used = (clock.setdefault(kind, []) for clock in (self._profile.steps, self._profile.processor))
        with measured():
            began, before = time.perf_counter(), time.process_time()
            yield
            times.append(time.perf_counter() - began)
            used.append(time.process_time() - before)

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        timeline, messages = Timeline(self._clock), InFlight(self._clock)
        with self._watching(timeline), watched_communication(timeline, messages):
            timeline.start()
            yield
            spans = timeline.stop()
        profile, in_flight = self._profile, messages.intervals()
        before = len(profile.hidden)
        for part, taken in seconds_by_part(spans).items():
            profile.parts.setdefault(part, [0.0] * before).append(taken)
        waits = [(span.start, span.end) for span in spans if span.part.kind == COMMUNICATION]
        profile.hidden.append(hidden_seconds(in_flight, waits))
        for seconds in profile.parts.values():
            seconds.extend([0.0] * (before + 1 - len(seconds)))
        if self.config.trace:
            profile.spans = [Span(span.part, span.start - self._zero, span.seconds) for span in spans]
            profile.in_flight = [(start - self._zero, end - self._zero) for start, end in in_flight]

    @contextmanager
    def _memory(self) -> Iterator[None]:
        timeline = MemoryTimeline(self._clock, self._meter, self._state.engine)
        with self._watching(timeline), timeline.saved.watching():
            timeline.start()
            yield
            self._profile.memory = timeline.read()

    @contextmanager
    def _watching(self, timeline: Timeline) -> Iterator[None]:
        """While open, the timeline follows the model and the engine's own calls."""
        engine = self._state.engine
        with ExitStack() as stack:
            for (owner, name), what in step_calls(engine):
                stack.enter_context(replaced(owner, name, timed(timeline, ENGINE_PARTS[what])))
            stack.enter_context(watched_model(engine.module, timeline))
            self._timeline = timeline
            yield
            self._timeline = None


def plain_profile(profile: RankProfile) -> dict[str, Any]:
    """A rank's measurements as values that JSON holds, which has no objects for keys such as parts."""
    memory = profile.memory
    values = asdict(replace(profile, parts={}, memory=None))
    values["parts"] = [asdict(part) | {"seconds": seconds} for part, seconds in profile.parts.items()]
    if memory:
        most = memory.layers_most.items()
        layers = [asdict(part) | {"bytes": memory.layers[part], "most_bytes": size} for part, size in most]
        values["memory"] = asdict(replace(memory, layers=Counter(), layers_most=Counter())) | {"layers": layers}
        del values["memory"]["layers_most"]
    return values
