"""What a rank tells its machine of where it is, without an exchange or a file: a few numbers in shared memory."""

import mmap
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqtrain.runtime.host import PULSE, PULSE_BYTES
from seqtrain.runtime.task import Callback, Phase

# Seconds between two beats.
BEAT_SECONDS = 1.0
JOINING, STARTING, ENDING = "joining the others", "starting", "ending"
# `between`: the loop's own work between the phases that callbacks know.
PHASES = (JOINING, STARTING, "between", "step", "data", "evaluation", "checkpoint", ENDING)


class Pulse:
    """Where this rank is; nobody looks at it unless `share_with` was called."""

    def __init__(self) -> None:
        self._shared: mmap.mmap | bytearray = bytearray(PULSE_BYTES)
        self._lock = threading.Lock()
        self._beats, self._exchanges, self._step, self._phase, self._noticed = 0, 0, -1, 0, 0

    def share_with(self, file: Path) -> None:
        """Shares the numbers through `file`, and lets them tell that the process lives."""
        with file.open("r+b") as opened:
            self._shared = mmap.mmap(opened.fileno(), PULSE_BYTES)
        self._write()

        def beat() -> None:
            while True:
                self._beats += 1
                self._write()
                time.sleep(BEAT_SECONDS)

        threading.Thread(target=beat, name="pulse", daemon=True).start()

    def exchange(self) -> None:
        """One more exchange with the other ranks is about to be made."""
        self._exchanges += 1
        self._write()

    def enter(self, phase: str, step: int = -1) -> None:
        """A phase begins, after `step` steps of training."""
        self._phase, self._step = PHASES.index(phase), max(step, self._step)
        self._write()

    def notice(self, *_: Any) -> None:
        """This process was told that it has little time left; also a handler for SIGTERM."""
        # No lock: the handler may have interrupted its holder.
        self._noticed = 1

    def _write(self) -> None:
        with self._lock:
            self._shared[:] = struct.pack(PULSE, self._beats, self._exchanges, self._step, self._phase, self._noticed)


@dataclass
class Told(Callback):
    """Tells `pulse` of the phases of a rank, and `callback` of all."""

    callback: Callback
    pulse: Pulse
    _steps_done: Callable[[], int] = field(default=lambda: -1)

    def begin(self, state: Any) -> None:
        self._steps_done = lambda: state.progress.step
        self.callback.begin(state)

    def phase(self, name: Phase) -> AbstractContextManager[Any]:
        return self._within(name)

    @contextmanager
    def _within(self, name: Phase) -> Iterator[None]:
        self.pulse.enter(name, self._steps_done())
        with self.callback.phase(name):
            yield
        self.pulse.enter("step" if name == "data" else "between", self._steps_done())

    def end(self) -> None:
        self.pulse.enter(ENDING, self._steps_done())
        self.callback.end()
