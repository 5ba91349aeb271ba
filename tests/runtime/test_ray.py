"""The ranks as Ray workers: a killed one is replaced and nothing else changes; a mistake stops the run at once."""

import json
import os
import signal
import threading
import time

import psutil
import pytest
from runtime_cases import change, folder_of, losses, on_ranks, records, session_for, small_config, train_each

from seqtrain.errors import DataError
from seqtrain.runtime import ray_launcher, run
from seqtrain.runtime.worker import Session

WORKER_NAME = "RayTrainWorker"


def workers() -> list[psutil.Process]:
    """The Ray workers that are ranks, started by this process."""
    return [p for p in psutil.Process().children(recursive=True) if WORKER_NAME in " ".join(p.cmdline())]


def test_a_killed_worker_is_replaced_and_the_losses_stay_the_same(tmp_path):
    config = small_config(
        tmp_path,
        runtime={"name": "ray"},
        parallel={"data": 2, "zero_stage": 2},
        train={"steps": 60, "sequence_length": 128},
        checkpoint={"every": 4},
    )
    undisturbed = change(config, output_dir=str(tmp_path / "undisturbed"))
    on_ranks(2, train_each, [session_for(undisturbed)])
    listening: list[str] = []

    def kill() -> None:
        while len(records(config)) < 6:
            time.sleep(0.01)
        ours = {p.pid for p in psutil.Process().children(recursive=True)}
        listening.extend(c.laddr.ip for c in psutil.net_connections() if c.pid in ours and c.status == "LISTEN")
        os.kill(workers()[1].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    summary = run(config)
    thread.join(1)
    assert summary["restarts"] == 1
    assert [record["step"] for record in records(config)] == list(range(1, 61))
    assert losses(config) == losses(undisturbed)
    assert len(folder_of(config).starts.read_text().splitlines()) == 2
    assert workers() == []
    assert listening
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, "nothing may be reachable from another machine"


def test_an_error_that_a_restart_would_meet_again_stops_at_once(tmp_path):
    config = small_config(tmp_path, runtime={"name": "ray"})
    session = session_for(config)
    broken = Session(config, tmp_path / "no-corpus", session.name, session.tracking_id)
    with pytest.raises(DataError, match=r"no-corpus/manifest\.json") as error:
        ray_launcher.launch(broken, poll=lambda: None)
    assert "\n" not in str(error.value)
    assert not folder_of(config).starts.exists()
    assert workers() == []


def test_the_error_of_a_rank_reaches_the_driver_as_one_line(tmp_path):
    config = small_config(tmp_path)
    folder = session_for(config).folder
    ray_launcher._leave_error(folder, 1, ZeroDivisionError("first\nline"))
    ray_launcher._leave_error(folder, 0, ValueError("came later"))
    assert "ZeroDivisionError" in json.loads(folder.error.read_text())["traceback"]
    with pytest.raises(ray_launcher.WorkerError, match=r"^rank 1: ZeroDivisionError: first line \(the traceback is in"):
        ray_launcher._raise_left_error(folder)
