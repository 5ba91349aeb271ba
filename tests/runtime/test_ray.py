"""The ranks as Ray workers: a killed one is replaced and nothing else changes; a mistake stops the run at once."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from seqtrain.errors import ConfigError, DataError
from seqtrain.models import LanguageModel
from seqtrain.parallel.testing import rank_outcomes
from seqtrain.runtime import rank_group, ray_launcher, run, source, watch, worker
from seqtrain.runtime.cluster import Node
from seqtrain.runtime.lease import succeed
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.ranks import is_lost_peer
from seqtrain.runtime.restarts import Place
from seqtrain.runtime.timeline import Timeline
from seqtrain.runtime.watch import RankState
from seqtrain.runtime.worker import Session, train
from tests.runtime.runtime_cases import (
    change,
    folder_of,
    launched,
    losses,
    records,
    session_for,
    small_config,
    train_on,
)

NOBODY = 65534
WORKER_NAME = "RayTrainWorker"


def workers() -> list[psutil.Process]:
    """The Ray workers that are ranks, started by this process."""
    return [p for p in psutil.Process().children(recursive=True) if WORKER_NAME in " ".join(p.cmdline())]


def done_by_another_user(attempts: dict[str, Callable[[], object]]) -> list[str]:
    """Those of `attempts` that succeed in a process that has become nobody."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for name, attempt in attempts.items():
            with suppress(OSError):
                attempt()
                os.write(writing, f"{name}\n".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as done:
        return done.read().split()


def attempts_on(folder: Path, ours: list[psutil.Process]) -> dict[str, Callable[[], object]]:
    """What another user might try on Ray's token, files, sockets and processes; and what he may."""
    sockets = [Path(path) for path in folder.rglob("*") if path.is_socket()]
    assert sockets
    return {
        "nothing": lambda: None,
        "token": (folder / "token").read_bytes,
        "list": lambda: os.listdir(folder),
        **{path.name: lambda path=path: socket.socket(socket.AF_UNIX).connect(str(path)) for path in sockets},
        **{f"{process.pid}": lambda process=process: os.kill(process.pid, 0) for process in ours},
    }


@pytest.mark.all
def test_a_killed_and_a_stopped_worker_are_replaced_and_the_losses_stay_the_same(tmp_path, monkeypatch):
    """On a sequence sharded over two workers: what the one knows of the other is lost in the middle of a scan."""
    config = small_config(
        tmp_path,
        *("gated_delta_net", "s5", "attention"),
        runtime={"name": "ray"},
        parallel={"sequence": 2, "zero_stage": 2},
        train={"steps": 16, "sequence_length": 101, "batch_size": 2, "micro_batch_size": 1},
        checkpoint={"every": 4},
    )
    undisturbed = change(config, "undisturbed")
    train_on(undisturbed)
    listening: list[tuple[str, str]] = []
    done: list[str] = []

    def kill() -> None:
        while len(records(config)) < 6:
            time.sleep(0.01)
        children = psutil.Process().children(recursive=True)
        ours = {process.pid: process.name() for process in children}
        if os.geteuid() == 0:
            done.extend(done_by_another_user(attempts_on(ray_launcher._private_folder(), children)))
        found = [c for c in psutil.net_connections() if c.pid in ours and c.status == "LISTEN"]
        listening.extend((c.laddr.ip, ours[c.pid]) for c in found)
        os.kill(workers()[1].pid, signal.SIGKILL)
        starts = folder_of(config).starts
        while len(starts.read_text().splitlines()) < 2 or len(records(config)) < 9:
            time.sleep(0.01)
        os.kill(workers()[0].pid, signal.SIGSTOP)

    monkeypatch.setattr(watch, "STOPPED_SECONDS", 0.5)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    summary = run(config)
    thread.join(1)
    assert summary["restarts"] == 2
    log = folder_of(config).log.read_text()
    assert "was ended by SIGKILL" in log
    assert "is stopped in " in log
    assert "most recent call first" in log
    assert [record["step"] for record in records(config)] == list(range(1, 17))
    assert losses(config) == losses(undisturbed)
    assert len(folder_of(config).starts.read_text().splitlines()) == 3
    assert workers() == []
    assert listening
    reachable = {each for each in listening if each[0] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")}
    assert not reachable, "nothing may be reachable from another machine"
    # Only root can become another user.
    assert done == (["nothing"] if os.geteuid() == 0 else [])


class Failing(LanguageModel):
    """Rank 1 fails in its third pass, in the way the test asks for."""

    way = "forward"
    calls = 0

    def forward(self, *arguments, **options):
        self.calls += 1
        due = self.calls == 3 and os.environ["RANK"] == "1"
        if due and self.way == "forward":
            raise ZeroDivisionError("of rank 1")
        if due and self.way == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().forward(*arguments, **options)
        if due:
            loss.register_hook(lambda gradient: 1 / 0)
        return loss


@pytest.mark.all
@pytest.mark.parametrize("way", ["forward", "backward", "death"])
def test_a_rank_that_fails_ends_those_that_wait_for_its_states(tmp_path, monkeypatch, way):
    monkeypatch.setattr(source, "LanguageModel", Failing)
    monkeypatch.setattr(Failing, "way", way)
    config = small_config(tmp_path, parallel={"sequence": 2}, checkpoint={"every": 0})
    session = session_for(config)
    # A rank that did wait for the time-out of its exchanges would not come to an end here.
    left, failed = rank_outcomes(2, launched, 2, lambda ranks: train(session, ranks), (), limit=60, group_timeout=600)
    assert is_lost_peer(left.error), left
    if way == "death":
        assert not session.lease.current().error.exists(), "Ray is to start the ranks again"
        return
    assert isinstance(failed.error, ZeroDivisionError)
    told = rank_group.left_error(session.lease.current())
    assert (told["rank"], told["kind"], told["of_user"]) == (1, "ZeroDivisionError", False)


@pytest.mark.all
def test_an_error_that_a_restart_would_meet_again_stops_at_once(tmp_path):
    config = small_config(tmp_path, runtime={"name": "ray"})
    session = session_for(config)
    broken = Session(config, tmp_path / "no-corpus", session.name, session.epoch)
    with pytest.raises(ConfigError, match=r"doesn't see .*no-corpus") as error:
        ray_launcher.launch(broken, lambda: None, ProgressDisplay(steps=1))
    assert "\n" not in str(error.value)
    assert not folder_of(config).starts.exists()
    assert workers() == []


class HostsOf:
    """What a group asks of its hosts after a failure."""

    def __init__(self, nodes):
        self.nodes = {node.id: node for node in nodes}

    def place(self, node, pid):
        return Place(node.host, pid, node.id)

    def silent(self):
        return False

    def look(self, seconds):
        return {}, []


def test_the_error_of_a_rank_reaches_the_driver_as_one_line(tmp_path):
    session = session_for(small_config(tmp_path))
    earlier, lease = succeed(session.lease), succeed(session.lease)
    worker.leave_error(earlier, 0, DataError("of a group that was replaced"), step=2)
    rank_group.raise_mistake(session)
    worker.leave_error(lease, 1, ZeroDivisionError("first\nline"), step=3)
    worker.leave_error(lease, 0, ValueError("came later"), step=3)
    assert "ZeroDivisionError" in json.loads(lease.own.error.read_text())["traceback"]
    rank_group.raise_mistake(session)
    nodes = [Node("n", "a", "10.0.0.1", 1, 0), Node("m", "b", "10.0.0.2", 1, 0)]
    group = rank_group.RankGroup(session, HostsOf(nodes), nodes, lambda: None, Timeline(), on_gpu=False)
    lost_it, killed = (
        RankState(rank, 7 + rank, status, False, "RuntimeError: Connection closed by peer", 1, 1, 3, 3, 0)
        for rank, status in ((0, 1), (1, -9))
    )
    failure = group._failed({0: lost_it, 1: killed})
    assert str(failure) == "rank 1 (process 8 on b) failed: ZeroDivisionError: first line after step 3"
    lease.own.error.unlink()
    ended = "rank 1 (process 8 on b) was ended by SIGKILL (by someone, or for want of memory)"
    assert str(group._failed({0: lost_it, 1: killed})) == f"{ended} before its first step"
    later = succeed(session.lease)
    worker.leave_error(later, 0, DataError("the file is gone"), step=3)
    with pytest.raises(DataError, match=r"^the file is gone$"):
        rank_group.raise_mistake(session)
