"""A machine's part of a run: an actor of Ray's that has ranks forked there, watches them, and tells the driver.

It is sent to its machine by value, and imports nothing of this package: what ranks need is imported once a machine, by
`runtime.fork_server`, which the actor starts.
"""

import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# What a rank tells of itself in a file that it shares with this process: see `runtime.pulse`. In this order: beats of a
# thread that does nothing else, exchanges with other ranks, steps done (-1 before the first), number of the phase,
# whether it was sent SIGTERM.
PULSE, PULSE_BYTES = "<QQqQQ", 40
# Bytes kept of what a rank has printed last, and of its calls.
SAID_BYTES, STACK_BYTES = 4000, 2**16
# Seconds without a call of the driver's after which nobody is taken to want the ranks any more.
FORGOTTEN_SECONDS = 600.0
# Seconds for which a network file system may hide a new file.
SHOWN_SECONDS = 10.0
# Seconds in which a process of Python's begins to listen.
CONNECT_SECONDS = 60.0


class Host:
    """Ranks of one machine. `paths`: where Python looks for modules; `folder`: the one that ranks work in.

    `server`: where a fork server listens already; empty starts one.
    """

    def __init__(self, paths: Sequence[str], folder: str, server: str = ""):
        # Names of sockets are limited.
        short = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
        self._pulses = Path(tempfile.mkdtemp(prefix="seqtrain-ranks-", dir=short))
        self._news = threading.Condition()
        self._version = 0
        self._about: dict[str, Any] | None = None
        # By rank: process, and exit status as `subprocess` has it, None while it runs.
        self._pids: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        # Those the fork server was asked for, and has not said that it has them.
        self._asked: set[int] = set()
        self._called = time.monotonic()
        self._paths, self._folder = paths, folder
        self._serve(server)
        threading.Thread(target=self._end_if_forgotten, daemon=True).start()

    def _serve(self, server: str = "") -> None:
        """Takes the fork server that listens at `server`, or starts one."""
        address = server or str(self._pulses / f"server-{time.monotonic_ns()}")
        self._server = None if server else start_server(address, self._paths, self._folder)
        self._connection, self._serves = _connect(address), True
        threading.Thread(target=self._listen, daemon=True).start()

    def about(self) -> dict[str, Any]:
        """What `fork_server.about` says, once all is imported; `error` where that failed."""
        with self._news:
            self._news.wait_for(lambda: self._about is not None)
            return {"host": socket.gethostname(), "port": _free_port(), **(self._about or {})}

    def unseen(self, paths: Sequence[str]) -> list[str]:
        """Those of `paths` that aren't there for this machine; a network file system may take a while to show them."""
        end = time.monotonic() + SHOWN_SECONDS
        while (missing := [path for path in paths if not Path(path).exists()]) and time.monotonic() < end:
            time.sleep(0.5)
        return missing

    def start(self, environments: dict[int, dict[str, str]], work: bytes) -> None:
        """Forks a rank for each of these, by rank; `work`: a pickled function of a rank's `Pulse`."""
        forks = {}
        with self._news:
            if not self._serves:
                self._serve()
        for rank, environment in environments.items():
            pulse, said = self._pulses / f"{rank}", self._words(rank)
            pulse.write_bytes(bytes(PULSE_BYTES))
            said.write_bytes(b"")
            with pulse.open("r+b") as file:
                self._maps[rank] = mmap.mmap(file.fileno(), PULSE_BYTES)
            forks[rank] = (environment, str(pulse), str(said))
        with self._news:
            self._pids, self._ended, self._asked = {}, {}, set(forks)
        # Where it ends before it has read this, `_listen` notices.
        with suppress(OSError):
            self._connection.send((forks, work))

    def watch(self, seen: int, seconds: float) -> tuple[int, list[tuple[Any, ...]]]:
        """The number of the news, above `seen` unless there was none for so many seconds, and each rank's state.

        `(rank, process, exit status or None, whether it is stopped, what it said if it ended, *numbers of PULSE)`.
        """
        self._called = time.monotonic()
        with self._news:
            self._news.wait_for(lambda: self._version > seen, seconds)
            states = [self._state(rank, pid) for rank, pid in self._pids.items()]
            return self._version, states

    def end(self) -> None:
        """Ends all ranks at once; returns when they are gone."""
        with self._news:
            for rank, pid in self._pids.items():
                if rank not in self._ended:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._news.wait_for(lambda: self._ended.keys() >= self._pids.keys(), 30)

    def stacks(self) -> dict[int, str]:
        """Where each rank that runs is in its program, by rank."""
        with self._news:
            running = {rank: pid for rank, pid in self._pids.items() if rank not in self._ended}
        before = {rank: self._words(rank).stat().st_size for rank in running}
        for pid in running.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        # From the first line on: the innermost call is what matters.
        found = {rank: self._words(rank).read_bytes()[before[rank] :] for rank in running}
        return {rank: text[:STACK_BYTES].decode(errors="replace") for rank, text in found.items()}

    def close(self) -> None:
        """Ends all, and removes what was written."""
        self.end()
        self._connection.close()
        if self._server:
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(5)
        shutil.rmtree(self._pulses, ignore_errors=True)

    def _listen(self) -> None:
        """Takes what the fork server says."""
        with suppress(EOFError, OSError):
            while True:
                kind, value = self._connection.recv()
                with self._news:
                    if kind == "about":
                        self._about = value
                    elif kind == "started":
                        self._pids, self._asked = value, set()
                    else:
                        rank, status = value
                        self._ended[rank] = status
                    self._version += 1
                    self._news.notify_all()
        with self._news:
            # It takes its ranks with it.
            self._about = self._about or {"error": "the process that imports what ranks need has ended"}
            self._pids |= dict.fromkeys(self._asked, 0)
            self._ended = {rank: self._ended.get(rank, -signal.SIGKILL) for rank in self._pids}
            self._serves, self._asked = False, set()
            self._version += 1
            self._news.notify_all()

    def _end_if_forgotten(self) -> None:
        while time.monotonic() - self._called < FORGOTTEN_SECONDS:
            time.sleep(FORGOTTEN_SECONDS / 20)
        self.end()

    def _state(self, rank: int, pid: int) -> tuple[Any, ...]:
        ended = self._ended.get(rank)
        said = self._said(rank) if ended else ""
        return (rank, pid, ended, ended is None and _is_stopped(pid), said, *struct.unpack(PULSE, self._maps[rank][:]))

    def _words(self, rank: int) -> Path:
        """Where a rank writes what it has to say."""
        return self._pulses / f"{rank}.txt"

    def _said(self, rank: int) -> str:
        with suppress(OSError), self._words(rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - SAID_BYTES))
            return file.read().decode(errors="replace")
        return ""


def start_server(address: str, paths: Sequence[str], folder: str) -> "subprocess.Popen[bytes]":
    """Starts a fork server that listens at `address`, a file in a folder that nobody else can enter."""
    return subprocess.Popen(
        [sys.executable, "-m", "seqtrain.runtime.fork_server", address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder if Path(folder).is_dir() else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _connect(address: str) -> Connection:
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            client = socket.socket(socket.AF_UNIX)
            client.connect(address)
            return Connection(client.detach())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _is_stopped(pid: int) -> bool:
    """Whether the process was stopped (SIGSTOP), as only Linux says here."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in ("T", "t")
    return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port
