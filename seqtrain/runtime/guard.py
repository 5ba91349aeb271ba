"""A parent of the process that starts Ray: however that one ends, it says so in a line, and nothing is left running.

Ray's native part may end the process it runs in (its raylet or its control service was killed), and prints paragraphs
of its own below Python; they are kept for run.log.
"""

import atexit
import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

from seqtrain.errors import exit_status

# Of prctl(2): the signal a process gets when its parent dies, and who adopts processes whose parent died.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds that processes which are left have to end by themselves.
GRACE = 5.0


def _native_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


# More of them are a pool for computing, which would hang in a child.
AT_IMPORT = _native_threads()


def guarded(work: Callable[[], int], log_file: Callable[[], Path], *, resume: Callable[[], str]) -> int:
    """The exit status of `work`, which runs in a forked child.

    `log_file`: gets what the child's libraries write to stderr, where it is there at the end. `resume`: says what is
    kept, where the child died. Runs `work` here where threads have been started, or the system isn't Linux.
    """
    if sys.platform != "linux" or threading.active_count() > 1 or _native_threads() > AT_IMPORT:
        return work()
    others = set(psutil.Process().children())
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        sys.stderr.flush()
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        ended, ending = os.pipe()
        child = os.fork()
        if child == 0:
            _run(work, said, ending)
        os.close(ending)
        status = _wait(child)
        normally = os.read(ended, 1)
        os.close(ended)
        _end_all(set(psutil.Process().children(recursive=True)) - others)
        _prctl(PR_SET_CHILD_SUBREAPER, 0)
        said.seek(0)
        if (text := said.read()) and log_file().is_file():
            with log_file().open("ab") as log:
                log.write(text)
    if normally:
        return status
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    print(f"error: the process that runs Ray ended by {how} (what it said: {log_file()}); {resume()}", file=sys.stderr)
    return 1


class _Terminal:
    """A stream of this process; but what Ray's threads write there goes to `aside`."""

    def __init__(self, terminal: IO[str], aside: IO[str]):
        self.terminal, self.aside = terminal, aside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.aside if threading.current_thread().name.startswith("ray_") else self.terminal, name)


def _run(work: Callable[[], int], said: IO[bytes], ending: int) -> None:
    """The child: runs `work` and exits. Of what is written to stderr, Python's own goes where it went."""
    status = 1
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        aside = os.fdopen(os.dup(said.fileno()), "w", buffering=1)
        # Another file where somebody has redirected it.
        terminal = os.fdopen(os.dup(2), "w", buffering=1) if sys.stderr.fileno() == 2 else sys.stderr
        sys.stdout, sys.stderr = _Terminal(sys.stdout, aside), _Terminal(terminal, aside)
        os.dup2(said.fileno(), 2)
        status = exit_status(work)
        # Ray's and others' own ends.
        atexit._run_exitfuncs()
        os.write(ending, b"1")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os.write(ending, b"1")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int) -> int:
    """The exit status of `child`, minus a signal's number; passes on signals that were sent to this process alone."""
    waited = {*FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    try:
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            came = signal.sigtimedwait(waited, 1.0)
            # A terminal (the kernel) sends them to both.
            if came and came.si_signo in FORWARDED and came.si_code <= 0:
                os.kill(child, came.si_signo)
    finally:
        # Those that came meanwhile were for the child.
        while signal.sigtimedwait(waited, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_all(processes: set[psutil.Process]) -> None:
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                end(process)
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(list(processes), timeout=GRACE)
        processes = set(left)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
