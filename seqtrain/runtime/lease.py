"""Who may write a run's folder: the start that took its newest epoch and renews its lease.

`.epochs/000003/` belongs to the process whose exclusive creation of `holder.json` in it succeeded. The driver takes an
epoch, then so does each group of ranks that it starts; whoever finds a newer one than its own has been replaced and
writes nothing more. A file system is asked for exclusive creation and atomic replacement only, which NFS and Lustre
have too, an object store for a conditional write, and the clocks of two machines are never compared: a second start
watches for one lease's time.
"""

import datetime
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from seqtrain.errors import CheckpointError, ConfigError, FencedError, SeqtrainError
from seqtrain.files import Manifest, create_new, make_folder, read_record, remove_folder, replace_file

log = logging.getLogger("seqtrain.runtime")

# Renewals in the time after which a lease that is not renewed has expired.
RENEWALS = 4
RELEASED = b"released"
# The step of the newest checkpoint that was ever written into the folder.
SAVED = "saved"


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or would be if its parent had asked for its status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True)
class Process:
    """A process as any machine knows it. `machine`: differs where process numbers mean others."""

    host: str
    machine: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Process":
        return cls(socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time())

    def ended(self) -> bool:
        """Whether it is known to be gone; False for one of another machine."""
        if self.machine != _machine():
            return False
        try:
            found = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return True
        return has_ended(found) or abs(found.create_time() - self.started) > 1


@dataclass(frozen=True)
class Holder(Manifest):
    """Who has taken an epoch. `processes`: the driver, and rank 0 where ranks took it. `taken`: seconds since 1970."""

    error = CheckpointError
    remedy = "so nobody knows who holds the folder"

    session: str
    processes: list[Process]
    lease_seconds: float
    taken: float


class EpochFolder:
    """What the processes of one start tell each other, where those of an earlier one don't look."""

    def __init__(self, path: Path):
        self.path = path
        self.holder = path / "holder.json"
        # Changes as long as the holder lives.
        self.alive = path / "alive"
        # Appears when the ranks are to save and stop.
        self.stop = path / "stop"
        # How much of the current step is done.
        self.within = path / "within.json"
        # What rank 0 hands back to the process that started it.
        self.outcome = path / "outcome.json"
        # The first error that a rank raised itself.
        self.error = path / "error.json"
        # Ray's own records of the run.
        self.ray = path / "ray"

    @property
    def number(self) -> int:
        return int(self.path.name)

    def holds(self) -> Holder | None:
        """Who has taken it; None where that can't be read, as while it is written."""
        with suppress(CheckpointError):
            return Holder.read(self.holder)
        return None

    def is_free(self) -> bool:
        """Whether nobody can be writing under it any more."""
        if _content(self.alive) == RELEASED:
            return True
        holder = self.holds()
        return holder is not None and all(process.ended() for process in holder.processes)


def saved_step(root: Path) -> int:
    """The step of the newest checkpoint that was written into the folder whose epochs are in `root`; 0 without."""
    with suppress(OSError, ValueError):
        return int((root / SAVED).read_text())
    return 0


def newest(root: Path) -> EpochFolder | None:
    """The newest epoch that anyone has taken of the folder whose epochs are in `root`."""
    taken = [file.parent for file in root.glob("*/holder.json") if file.parent.name.isdecimal()]
    return EpochFolder(max(taken, key=lambda folder: int(folder.name))) if taken else None


@dataclass(frozen=True)
class Lease:
    """An epoch that this process has taken for `session`. `driver`: of the start, whose ranks take later ones.

    `store`: that of the place where the run's checkpoints are, if it is another one.
    """

    root: Path
    epoch: int
    session: str
    driver: bool = False
    store: "Lease | None" = None

    @property
    def own(self) -> EpochFolder:
        return EpochFolder(self.root / f"{self.epoch:06d}")

    def current(self) -> EpochFolder:
        """The newest epoch, if it is this one or, for a driver, one of its ranks'. Raises `FencedError` if not."""
        found = newest(self.root)
        if found and found.number == self.epoch:
            return found
        holder = found.holds() if found else None
        if found and holder and self.driver and holder.session == self.session:
            return found
        raise FencedError(
            f"{_name(self.root)}: {_describe(holder)} has taken over this run, so this start ends here; "
            "what it had saved before is kept"
        )

    def check(self) -> None:
        """Raises `FencedError` where another start has taken over; to be called before everything that is written."""
        self.current()
        if self.store:
            self.store.check()

    @property
    def of_checkpoints(self) -> "Lease":
        """That of the place where they are."""
        return self.store or self

    def note_saved(self, step: int) -> None:
        """Notes that a checkpoint of this step was written."""
        replace_file(self.root / SAVED, str(step).encode())

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Keeps the lease alive from a thread while the block runs."""
        with self.store.renewed() if self.store else nullcontext(), self._renewed():
            yield

    @contextmanager
    def _renewed(self) -> Iterator[None]:
        holder, ended = self.own.holds(), threading.Event()
        every = holder.lease_seconds / RENEWALS if holder else 1.0

        def renew() -> None:
            while True:
                # A full disk or a network that is down now may be well again the next time.
                with suppress(OSError):
                    try:
                        replace_file(self.current().alive, uuid.uuid4().bytes, durable=False)
                    except FencedError:
                        return
                if ended.wait(every):
                    return

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def release(self) -> None:
        """Says that nothing more will be written, and removes what only this start's processes had use for."""
        if self.store:
            self.store.release()
        with suppress(FencedError, OSError):
            replace_file(self.current().alive, RELEASED, durable=False)
            for folder in _others(self.root, self.current()):
                remove_folder(folder)


def take(
    root: Path, session: str, *, seconds: float, wait: Callable[[str], None] = log.info, store: Path | None = None
) -> Lease:
    """A new epoch for the driver of `session`. `seconds`: after which its lease expires unless it is renewed.

    `store`: another root, of which one is taken as well.

    Where the newest epoch is held, watches it for its lease's time; `wait` is told so. Raises `ConfigError` if it was
    renewed meanwhile.
    """
    while True:
        held = newest(root)
        if held and not held.is_free():
            _watch(held, seconds, wait)
            # Another start may have waited beside this one; a group of ranks may have been started again.
            if (now := newest(root)) is None or now.number != held.number:
                continue
        lease = _create(root, held, Holder(session, [Process.this()], seconds, time.time()), driver=True)
        if lease:
            for folder in _others(root, lease.own):
                remove_folder(folder)
            return lease if store is None else _with_store(lease, store, seconds, wait)


def _with_store(lease: Lease, store: Path, seconds: float, wait: Callable[[str], None]) -> Lease:
    try:
        return replace(lease, store=take(store, lease.session, seconds=seconds, wait=wait))
    except BaseException as error:
        lease.release()
        if isinstance(error, SeqtrainError) or not isinstance(error, Exception):
            raise
        # Each kind of store has errors of its own.
        raise ConfigError(f"{_name(store)}: can't be written ({' '.join(str(error).split())})") from error


def succeed(started_by: Lease) -> Lease:
    """An epoch for ranks that the driver holding `started_by` has started; rank 0 calls it. Raises `FencedError`."""
    store = succeed(started_by.store) if started_by.store else None
    root = started_by.root
    while True:
        held = started_by.current()
        driver = started_by.own.holds()
        processes = [*(driver.processes if driver else []), Process.this()]
        seconds = driver.lease_seconds if driver else 0.0
        if lease := _create(root, held, Holder(started_by.session, processes, seconds, time.time())):
            return replace(lease, store=store)


def _create(root: Path, after: EpochFolder | None, holder: Holder, *, driver: bool = False) -> Lease | None:
    """The epoch that follows `after`, if this process is the first to create it."""
    lease = Lease(root, after.number + 1 if after else 1, holder.session, driver)
    make_folder(lease.own.path)
    if not create_new(lease.own.holder, holder.content()):
        return None
    # Whoever was stopped since it looked finds a number that was used, and whose folder is gone.
    found = newest(root)
    return lease if found and found.number == lease.epoch else None


def _watch(held: EpochFolder, seconds: float, wait: Callable[[str], None]) -> None:
    """Returns when `held` is free or was not renewed for its lease's time. Raises `ConfigError` if it was."""
    holder, seen = held.holds(), _content(held.alive)
    limit = max(seconds, holder.lease_seconds if holder else 0.0)
    wait(f"{_name(held.path.parent)}: held by {_describe(holder)}; waiting {limit:.0f} s for it to end")
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if held.is_free():
            return
        time.sleep(min(0.1, limit / RENEWALS))
    found = newest(held.path.parent)
    if _content(held.alive) != seen or (found and found.number != held.number):
        raise ConfigError(
            f"{_name(held.path.parent)}: {_describe(holder)} is writing this run; wait for it, stop it, or "
            "name another output_dir"
        )


def _others(root: Path, kept: EpochFolder) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and path.name.isdecimal() and path != kept.path]


def _name(root: Path) -> str:
    """The folder of the epochs in `root`, as the key that names it."""
    return f"{'output_dir' if isinstance(root, Path) else 'checkpoint.store'}={root.parent}"


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "another start"
    process = holder.processes[-1]
    since = datetime.datetime.fromtimestamp(holder.taken).strftime("%Y-%m-%d %H:%M:%S")
    return f"process {process.pid} on {process.host} (since {since}, {time.time() - holder.taken:.0f} s ago)"


def _content(file: Path) -> bytes:
    with suppress(OSError, ValueError):
        return read_record(file)
    return b""


@cache
def _machine() -> str:
    """What tells this machine, since it was started, and this space of process numbers from all others."""
    parts = [socket.gethostname()]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(place) if place.endswith("pid") else Path(place).read_text().strip())
    return "/".join(parts)
