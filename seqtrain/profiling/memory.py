"""What a rank's memory holds during a step, by kind, and when it holds most."""

import ctypes
import gc
import mmap
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.memory import peak_resident_bytes
from seqtrain.profiling.parts import OTHER, HostClock, Part, Timeline
from seqtrain.runtime.engine import Engine, held_tensors

LOSS, ACTIVATIONS, PROGRAM, WORKING = "loss", "activations", "program", "working memory"
# Bytes from which a tensor may be a buffer that is mostly untouched, as DeepSpeed's for gradients is.
LARGE = 2**24


class ResidentMeter:
    """Resident memory of this process. Where the system can't reset the peak, it is that of the whole program."""

    def now(self) -> int:
        """Bytes held at this moment."""
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else peak_resident_bytes()

    def peak(self) -> int:
        """Most bytes held at one time since `reset`."""
        return peak_resident_bytes()

    def reset(self) -> None:
        """Starts a new peak, at what is held now."""
        # What the C library keeps of freed memory isn't held. Only glibc has this; another may keep nothing.
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class CudaMeter(ResidentMeter):
    """What PyTorch has allocated on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


def resident_bytes_of(address: int, size: int) -> int:
    """How much of `size` bytes at `address` is in memory: what was allocated and never written to isn't.

    Where the system doesn't say, all of it.
    """
    page = mmap.PAGESIZE
    first = address // page * page
    states = (ctypes.c_ubyte * -(-(address + size - first) // page))()
    with suppress(AttributeError):
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(states) * page), states) == 0:
            return min(size, page * sum(state & 1 for state in states))
    return size


class SavedTensors:
    """Bytes that autograd keeps for the backward pass, by the part that was running when they were saved.

    Each storage counts once, for the first part that saves it, as long as anything saved of it lives; weights, which
    are there anyway, don't count.
    """

    def __init__(self, timeline: Timeline, model: nn.Module) -> None:
        self.bytes: Counter[Part] = Counter()
        self._timeline = timeline
        self._weights = {pointer_of(weight) for weight in (*model.parameters(), *model.buffers())}
        # By storage: how many saved tensors look at it, its bytes, and whose they are.
        self._held: dict[int, tuple[int, int, Part]] = {}

    def watching(self) -> AbstractContextManager[Any]:
        """While open, what is saved is counted; it is let go when autograd drops it, in the context or after it."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> "_Saved":
        pointer = pointer_of(tensor)
        if isinstance(tensor, nn.Parameter) or pointer in self._weights or tensor.numel() == 0:
            return _Saved(tensor, lambda: None)
        now = self._timeline.now
        count, size, part = self._held.get(pointer, (0, storage_bytes(tensor), Part(now.kind, "", now.layer)))
        if count == 0:
            self.bytes[part] += size
        self._held[pointer] = count + 1, size, part
        return _Saved(tensor, lambda: self._drop(pointer))

    def _drop(self, pointer: int) -> None:
        count, size, part = self._held.pop(pointer)
        if count > 1:
            self._held[pointer] = count - 1, size, part
        else:
            self.bytes[part] -= size


class _Saved:
    """A saved tensor that says when it is let go."""

    __slots__ = ("_drop", "tensor")

    def __init__(self, tensor: Tensor, drop: Callable[[], None]) -> None:
        self.tensor, self._drop = tensor, drop

    def __del__(self) -> None:
        self._drop()


def pointer_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's storage; on the CPU, of a large one, those that are in memory."""
    size = tensor.untyped_storage().nbytes()
    large = size >= LARGE and tensor.device.type == "cpu"
    return resident_bytes_of(pointer_of(tensor), size) if large else size


def held_by_engine(engine: Engine) -> dict[str, int]:
    """Bytes of an engine's tensors by kind, each storage once, for the first kind that has it."""
    seen: set[int] = {0}
    held = {}
    for kind, tensors in held_tensors(engine).items():
        new = {pointer_of(tensor): storage_bytes(tensor) for tensor in tensors if pointer_of(tensor) not in seen}
        seen |= set(new)
        held[kind] = sum(new.values())
    return held


@dataclass
class MemorySample:
    """The most that was held while the step was in one part.

    `saved_bytes`: what autograd kept for the backward pass when the part began or ended, whichever is more.
    """

    part: Part
    peak_bytes: int
    saved_bytes: int


@dataclass
class MemoryReading:
    """Memory of one rank over one step."""

    # Bytes held between steps, when nothing is under way.
    resting_bytes: int
    # Most that was held in the steps before, with what the allocator keeps of freed memory.
    run_peak_bytes: int
    peak_bytes: int = 0
    # Where the step was when it held most.
    peak_part: Part = OTHER
    # Bytes at that moment: those of `held_tensors`, LOSS, ACTIVATIONS, PROGRAM, WORKING. Together the peak.
    kinds: dict[str, int] = field(default_factory=dict)
    # Kept for the backward pass by layer and kind of module: at that moment, and the most of each at any.
    layers: Counter[Part] = field(default_factory=Counter)
    layers_most: Counter[Part] = field(default_factory=Counter)
    # In the order of the step. When is not said: looking at memory takes longer than much that is looked at.
    samples: list[MemorySample] = field(default_factory=list)


class MemoryTimeline(Timeline):
    """A time line that looks at the memory at every change of part."""

    def __init__(self, clock: HostClock, meter: ResidentMeter, engine: Engine) -> None:
        super().__init__(clock)
        self.saved = SavedTensors(self, engine.module)
        self._meter, self._engine = meter, engine
        self._before: Counter[Part] = Counter()
        self._part = OTHER

    def start(self) -> None:
        run_peak = self._meter.peak()
        gc.collect()
        self._meter.reset()
        self._reading = MemoryReading(self._meter.now(), run_peak)
        self._resting_kinds = held_by_engine(self._engine)
        super().start()

    def read(self) -> MemoryReading:
        """Ends the step and gives what was seen."""
        self.stop()
        reading = self._reading
        loss = sum(size for part, size in reading.layers.items() if part.kind == LOSS)
        reading.kinds |= {LOSS: loss, ACTIVATIONS: reading.layers.total() - loss}
        program = max(0, reading.resting_bytes - sum(self._resting_kinds.values()))
        working = reading.peak_bytes - program - sum(reading.kinds.values())
        reading.kinds |= {PROGRAM: program, WORKING: working}
        return reading

    def _changed(self) -> None:
        super()._changed()
        reading, peak, after = self._reading, self._meter.peak(), Counter(self.saved.bytes)
        # The first change is the step's beginning.
        if len(self._parts) > 1:
            saved = max(self._before, after, key=lambda sizes: sizes.total())
            reading.samples.append(MemorySample(self._part, peak, saved.total()))
            reading.layers_most |= saved
            if peak > reading.peak_bytes:
                reading.peak_bytes, reading.peak_part, reading.layers = peak, self._part, saved
                reading.kinds = held_by_engine(self._engine)
        self._before, self._part = after, self._parts[-1]
        self._meter.reset()
