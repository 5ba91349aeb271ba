"""Errors meant for users: one line that names what is wrong, what came, what is allowed, and the way out."""

import difflib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LOGGER = logging.getLogger("seqtrain")

# What the core is installed without, by the extra that brings it: names of modules.
EXTRAS = {
    "train": (
        "datasets", "deepspeed", "hydra", "matplotlib", "omegaconf", "psutil", "pyarrow", "ray", "rich",
        "tensorboardX", "tokenizers", "transformers", "wandb", "yaml",
    ),
    "convert": ("gguf",),
    "eval": ("lm_eval",),
    "store": ("upath", "s3fs"),
}  # fmt: skip

# Seconds until an interrupt that was passed over comes again.
AGAIN_SECONDS = 0.05


class SeqtrainError(ValueError):
    """A mistake in the input. Launchers print it as one line and exit with status 2."""


class ConfigError(SeqtrainError):
    """A configuration key, value or combination that can't be run."""


class DataError(SeqtrainError):
    """A missing, damaged or unreadable data file; the message names the file."""


class CheckpointError(SeqtrainError):
    """A checkpoint that is missing, damaged, or of another model; the message names the folder."""


class DamagedError(CheckpointError):
    """A checkpoint that is incomplete or not what was written: the one before may serve."""


class FencedError(SeqtrainError):
    """Another start has taken over the folder of this run, so nothing more may be written there."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the program at once: Ctrl-C, SIGTERM or SIGHUP, `number`. The message says what is kept."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> str:
    """The sentence for an unknown name: `mixer 'gal' is unknown; did you mean 'gla'? Known: ...`."""
    known = sorted(allowed)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{what} {name!r} is unknown{hint} Known: {', '.join(known)}"


def exit_status(work: Callable[[], int]) -> int:
    """The exit status of `work`, which what goes wrong ends in one printed line.

    2 for a user's mistake, a package that is not installed, and what the system refuses (a full disk, a folder without
    permission); 128 + the number of a signal; 1 for a bug, whose traceback is in run.log where there is one.
    """
    try:
        with _interrupted_by_signals():
            return work()
    except SeqtrainError as error:
        message = str(error)
    except KeyboardInterrupt as error:
        print(str(error) or "stopped by SIGINT", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        message = f"{package} is not installed: pip install 'seqtrain[{extra}]'"
    except BrokenPipeError:
        # Whoever read what is printed is gone, as in `... | head`: what Python prints at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        LOGGER.info("the error that ends the program", exc_info=True)
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except Exception as error:
        files = [handler.baseFilename for handler in LOGGER.handlers if isinstance(handler, logging.FileHandler)]
        if not files:
            raise
        # Only there: what a terminal shows are warnings.
        LOGGER.info("the error that ends the program", exc_info=True)
        text = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {text} (the traceback is in {files[0]})", file=sys.stderr)
        return 1
    print(f"error: {_in_one_line(message)}", file=sys.stderr)
    return 2


def _in_one_line(message: str) -> str:
    """`message` without what would move a terminal's cursor, and cut where it is endless: it may quote files."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP, unless ignored, end the block as Ctrl-C does, so that what it holds is let go.

    An interrupt that came where Python passes exceptions over, as in a `__del__`, comes again a little later.
    """
    usual = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    def lost(unraisable: Any) -> None:
        if isinstance(error := unraisable.exc_value, KeyboardInterrupt):
            number = getattr(error, "number", signal.SIGINT)
            again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            usual(unraisable)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for number, handler in before.items():
            signal.signal(number, handler)
