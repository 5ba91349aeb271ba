"""How a run is asked to stop: by a signal to any of its processes, or by a file in its folder."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from seqtrain.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Programs that start others (timeout, make) pass on a SIGINT that the terminal has sent to both: one key, two signals.
REPEAT_SECONDS = 0.5

# Set when this process was asked to stop. A signal reaches a process, so there is one per process.
ASKED = threading.Event()


def stop_requested(file: Path | None = None) -> bool:
    """Whether this process knows of a request, by a signal or by `file`: the driver's, which reaches other machines.

    Ranks look before every step, and must agree by an exchange before they act on it.
    """
    return ASKED.is_set() or (file is not None and file.exists())


def ask(signum: int = 0, frame: FrameType | None = None) -> None:
    """Asks this process to stop; also a handler for SIGTERM."""
    ASKED.set()


class Received:
    """The signal that asked the driver to stop: its number (0 before there was one), and when it came."""

    number = 0
    seconds = 0.0


@contextmanager
def listening(file: Path | None = None) -> Iterator[Received]:
    """While it is open, SIGINT, SIGTERM and SIGHUP ask the run to stop, also through `file`; another SIGINT later ends
    it at once. SIGHUP stays ignored where it was, as under nohup.
    """
    received = Received()

    def handle(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received.number and signum == signal.SIGINT and now - received.seconds > REPEAT_SECONDS:
            raise Interrupted(signum)
        received.number, received.seconds = signum, now
        ASKED.set()
        if file and file.parent.is_dir():
            file.touch()

    ASKED.clear()
    numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ASKED.clear()


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Keeps the handlers of these signals from what the block installs, as Ray does, also below Python."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    except SystemExit as error:
        # Ray's own way to end on SIGTERM.
        raise Interrupted(signal.SIGTERM, "stopped by SIGTERM while Ray was starting") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask_on_sigterm() -> None:
    """Takes SIGTERM as a request to stop, and leaves SIGINT to the driver; for the main thread of a worker."""
    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
