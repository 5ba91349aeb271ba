"""A process that has imported what ranks need, and forks one in a moment, however often they are started again.

    python -m seqtrain.runtime.fork_server ADDRESS

`runtime.host`, one a machine, speaks with it through the Unix socket ADDRESS. Where the connection ends, so do the
ranks.
"""

import ctypes
import faulthandler
import hashlib
import importlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from seqtrain.collector import lasting

# What every rank comes to, in the end.
IMPORTED = ("seqtrain.runtime.rank_group", "torch._dynamo", "deepspeed")
# Of prctl(2).
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def main(address: str) -> None:
    """Imports, says so to the one who connects, and forks ranks until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, began = os.getppid(), time.monotonic()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(1)
    error = _import()
    listening.settimeout(1.0)
    while True:
        try:
            client, _ = listening.accept()
            break
        except TimeoutError:
            # Whoever started this has ended meanwhile.
            if os.getppid() != parent:
                return
    listening.close()
    client.setblocking(True)
    connection = Connection(client.detach())
    if error:
        connection.send(("about", {"error": error}))
        return
    connection.send(("about", about() | {"seconds": time.monotonic() - began}))
    Server(connection).serve()


def _import() -> str:
    """Imports what ranks need; what went wrong, if it did."""
    # Asks NVML, not CUDA, which would be of no use in a forked process once it has begun here.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    try:
        # Nor does a rank's collector touch, and so copy, the memory that all ranks share.
        with lasting():
            for name in IMPORTED:
                importlib.import_module(name)
            importlib.import_module("seqtrain.runtime.engine").import_muon()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def about() -> dict[str, Any]:
    """What this machine runs: version and a hash of this package's code, Python's and torch's versions."""
    import seqtrain

    root, code = Path(seqtrain.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        code.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return {
        "version": seqtrain.__version__,
        "code": code.hexdigest()[:12],
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": importlib.import_module("torch").__version__,
    }


class Server:
    """Forks ranks, and says how they end."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self._woken, waking = socket.socketpair()
        self._waking = waking
        for end in (self._woken, waking):
            end.setblocking(False)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Rank by process.
        self._ranks: dict[int, int] = {}

    def serve(self) -> None:
        while True:
            ready = wait([self.connection, self._woken])
            if self._woken in ready:
                self._woken.recv(4096)
                self._reap()
            if self.connection in ready:
                try:
                    forks, work = self.connection.recv()
                except EOFError:
                    break
                self._fork(forks, work)
        for process in self._ranks:
            os.kill(process, signal.SIGKILL)

    def _reap(self) -> None:
        while self._ranks:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            if process in self._ranks:
                self.connection.send(("ended", (self._ranks.pop(process), os.waitstatus_to_exitcode(status))))

    def _fork(self, forks: dict[int, tuple[dict[str, str], str, str]], work: bytes) -> None:
        started, parent = {}, os.getpid()
        for rank, (environment, pulse, said) in forks.items():
            process = os.fork()
            if process == 0:
                self._leave()
                be_rank(rank, environment, Path(pulse), Path(said), work, parent)
            self._ranks[process] = rank
            started[rank] = process
        self.connection.send(("started", started))

    def _leave(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self.connection, self._woken, self._waking):
            end.close()


def be_rank(rank: int, environment: dict[str, str], pulse: Path, said: Path, work: bytes, parent: int) -> None:
    """Runs `work` in this process, which was just forked, and ends it: status 0, or 1 where it raised."""
    status = 1
    try:
        _end_with(parent)
        _name(f"RayTrainWorker rank {rank}")
        with said.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.environ.update(environment)
        from seqtrain.runtime.pulse import Pulse

        shared = Pulse()
        shared.share_with(pulse)
        # A machine's notice of its end; the driver decides what follows from it.
        signal.signal(signal.SIGTERM, shared.notice)
        pickle.loads(work)(shared)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the exit functions of the process that this was forked from.
        os._exit(status)


def _end_with(parent: int) -> None:
    """Has this process killed when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _name(title: str) -> None:
    """What `ps` calls this process, in place of its parent's command line."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_NAME, title.encode()[:15], 0, 0, 0)
    numbers = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    # Where the kernel looks for the command line (proc(5): arg_start and arg_end).
    start, end = int(numbers[45]), int(numbers[46])
    ctypes.memmove(start, title.encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main(sys.argv[1])
