"""However the process that runs Ray ends, a line says so and nothing that it started is left; signals at the start."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from seqtrain.errors import ConfigError, exit_status
from seqtrain.runtime.guard import guarded

fork = multiprocessing.get_context("fork")


def in_a_process(work, stderr: Path, *, signals=()) -> int:
    """The exit status of `work` in a process of its own, which gets `signals` once it has written to `stderr`."""

    def run() -> None:
        os.setsid()
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os._exit(work())

    process = fork.Process(target=run)
    process.start()
    for number in signals:
        while not (stderr.exists() and stderr.read_text()):
            time.sleep(0.01)
        os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


def guard(work, folder: Path, **options) -> int:
    (folder / "run.log").touch()
    resume, log = lambda: "step 3 is saved", lambda: folder / "run.log"
    return in_a_process(lambda: guarded(work, log, resume=resume), folder / "stderr", **options)


def refuse() -> int:
    raise ConfigError("key=value: wrong")


@pytest.mark.parametrize(
    ("work", "status", "said"), [(lambda: 7, 7, ""), (refuse, 2, "error: key=value: wrong\n")], ids=["ends", "refuses"]
)
def test_an_ordinary_end_is_passed_on(tmp_path, work, status, said):
    assert guard(work, tmp_path) == status
    assert (tmp_path / "stderr").read_text() == said


def test_a_death_is_one_line_and_leaves_no_process(tmp_path):
    def die() -> int:
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (tmp_path / "child").write_text(str(child.pid))
        os.write(2, b"a paragraph from below Python\n")
        thread = threading.Thread(target=lambda: print("of Ray's"), name="ray_listen_error_messages")
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert guard(die, tmp_path) == 1
    said = (tmp_path / "stderr").read_text()
    assert said.startswith("error: the process that runs Ray ended by SIGKILL (what it said: ")
    assert said.endswith("step 3 is saved\n")
    assert "\n" not in said[:-1]
    assert (tmp_path / "run.log").read_text() == "a paragraph from below Python\nof Ray's\n"
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_child_and_ends_the_start_in_one_line(tmp_path, number, request):
    # Whoever started the suite may have ignored it, as nohup does.
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, usual)))

    def wait() -> int:
        print("started", file=sys.stderr)
        time.sleep(60)
        return 0

    for run in (
        lambda: guard(wait, tmp_path, signals=[number]),
        lambda: in_a_process(lambda: exit_status(wait), tmp_path / "alone", signals=[number]),
    ):
        assert run() == 128 + number
    for file in ("stderr", "alone"):
        assert (tmp_path / file).read_text() == f"started\nstopped by {number.name}\n"


def test_a_hangup_that_is_ignored_stays_so(tmp_path):
    def work() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 3

    def under_nohup() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return exit_status(work)

    assert in_a_process(under_nohup, tmp_path / "stderr") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_where_python_passes_exceptions_over_is_not_lost(number, capsys):
    class Deleted:
        def __del__(self):
            signal.raise_signal(number)

    def work():
        Deleted()
        time.sleep(20)
        return 0

    # What runs in the background ignores SIGINT.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert exit_status(work) == 128 + number
    finally:
        signal.signal(signal.SIGINT, usual)
    assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name}\n"
