"""One owner of a run's folder: who may begin, who has been replaced, and that he who has changes nothing."""

import importlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from seqtrain.config import _fresh_folder, compose_config
from seqtrain.errors import ConfigError, DataError, FencedError
from seqtrain.runtime import lease as leases
from seqtrain.runtime import run
from seqtrain.runtime.lease import Lease, Process, newest, succeed, take
from seqtrain.runtime.metrics import MetricsFile
from seqtrain.runtime.resume import claimed
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.task import Callback, Pretraining
from tests.runtime.runtime_cases import change, folder_of, losses, on_ranks, small_config

fork = multiprocessing.get_context("fork")


@pytest.fixture
def elsewhere(monkeypatch):
    """Nothing is known of the processes that hold a lease: they are on other machines."""
    monkeypatch.setattr(Process, "ended", lambda process: False)


def take_now(root: Path, session: str = "next", seconds: float = 0.3) -> Lease:
    return take(root, session, seconds=seconds, wait=lambda line: None)


def test_a_folder_is_taken_when_its_holder_has_ended_or_let_go(tmp_path):
    child = fork.Process(target=take_now, args=(tmp_path, "child", 1e6))
    child.start()
    child.join()
    began = time.monotonic()
    lease = take_now(tmp_path)
    lease.release()
    assert take_now(tmp_path).epoch == 3
    assert time.monotonic() - began < 60, "the lease of a million seconds was not waited for"


def test_a_holder_that_renews_is_named_and_one_that_does_not_is_replaced(tmp_path, elsewhere):
    said = []
    held = take_now(tmp_path / ".epochs", "first", 2.0)
    message = rf"process {os.getpid()} on \S+ \(since .* s ago\) is writing"
    with held.renewed(), pytest.raises(ConfigError, match=message):
        take(tmp_path / ".epochs", "second", seconds=0.3, wait=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"output_dir={tmp_path}: held by process {os.getpid()}")
    lease = take_now(tmp_path / ".epochs", "second")
    with pytest.raises(FencedError, match=f"output_dir={tmp_path}: .* has taken over this run"):
        held.check()
    lease.check()


def test_of_many_that_begin_at_once_one_does(tmp_path, elsewhere):
    queue, over = fork.Queue(), fork.Event()

    def begin(number: int) -> None:
        try:
            with take_now(tmp_path, f"{number}", 2.0).renewed():
                queue.put(number)
                over.wait(30)
        except ConfigError:
            queue.put(None)

    take_now(tmp_path, "gone", 0.1)
    processes = [fork.Process(target=begin, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    outcomes = [queue.get(timeout=30) for _ in processes]
    over.set()
    for process in processes:
        process.join()
    assert outcomes.count(None) == 3


def test_ranks_that_were_started_again_fence_those_before_and_not_the_driver(tmp_path):
    driver = take_now(tmp_path, "run")
    first, second = succeed(driver), succeed(driver)
    driver.check()
    second.check()
    assert driver.current().number == second.epoch
    metrics = tmp_path / "metrics.jsonl"
    MetricsFile(metrics, second, step=0).write({"step": 1})
    with pytest.raises(FencedError):
        MetricsFile(metrics, first, step=0)
    other = take_now(tmp_path, "other")
    for lost in (driver, second):
        with pytest.raises(FencedError):
            lost.check()
    with pytest.raises(FencedError):
        succeed(driver)
    assert newest(tmp_path).number == other.epoch
    assert metrics.read_text() == '{"step": 1}\n'


def test_a_start_that_slept_through_others_does_not_take_a_number_that_was_used(tmp_path):
    for session in ("a", "b", "c"):
        take_now(tmp_path, session).release()
    slept = leases._create(tmp_path, leases.EpochFolder(tmp_path / "000001"), newest(tmp_path).holds())
    assert slept is None
    assert newest(tmp_path).number == 3


def test_a_run_that_never_began_leaves_nothing(tmp_path):
    def begin(place: Path) -> None:
        with claimed(RunFolder(place), "s", lease_seconds=1.0, began=place / "starts") as lease:
            assert lease.own.holder.exists()
            raise DataError("no text")

    with pytest.raises(DataError):
        begin(tmp_path / "a" / "b" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "\0"):
        with pytest.raises(ConfigError, match=r"^output_dir=.*: can't be written"):
            begin(place)


def replaced(root: Path) -> None:
    """Another start has taken the folder, as one does whose holder was stopped for long."""
    held = newest(root)
    assert leases._create(root, held, leases.Holder("other", [Process.this()], 9.0, time.time()))


@pytest.mark.all
def test_a_start_that_slept_before_it_began_changes_nothing(tmp_path, monkeypatch):
    """It is replaced while it reads the text; the other has not begun either, or has."""
    config = small_config(tmp_path)
    folder = folder_of(config)

    def prepare(data, *, pools):
        replaced(folder.epochs)
        folder.config.write_text("of the other")
        raise DataError("no text")

    running = importlib.import_module("seqtrain.runtime.run")
    real = running.prepare

    def replace_and_prepare(data, **others):
        replaced(folder.epochs)
        return real(data, **others)

    for error, work in ((DataError, prepare), (FencedError, replace_and_prepare)):
        monkeypatch.setattr(running, "prepare", work)
        if error is FencedError:
            take_now(folder.epochs).release()
        with pytest.raises(error):
            running._drive(config, Pretraining(), Callback(), lambda *told: None)
        assert folder.config.read_text() == "of the other"


def test_two_starts_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose_config("pretrain")
    with _fresh_folder(config, []) as first, _fresh_folder(config, ["seed=1"]) as second:
        assert {first, second} == {config.output_dir, f"{config.output_dir}-2"}
        (Path(first) / "config.yaml").touch()
    assert [path.name for path in tmp_path.glob("runs/*/*")] == [Path(first).name], "what stayed empty is removed"
    with _fresh_folder(config, ["output_dir=mine"]) as named:
        assert named == ""


@pytest.mark.all
def test_a_zombie_that_wakes_changes_nothing(tmp_path, elsewhere):
    """The first start is stopped, a second one replaces it and finishes; then the first goes on."""
    config = small_config(tmp_path, train={"steps": 40}, checkpoint={"every": 5})
    whole = change(config, "whole")

    def steps() -> int:
        return len(losses(config)) if folder_of(config).metrics.exists() else 0

    def first(queue) -> None:
        def stop() -> None:
            while steps() < 7:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGSTOP)

        threading.Thread(target=stop, daemon=True).start()
        try:
            run(config)
        except FencedError as error:
            queue.put(str(error))

    queue = fork.Queue()
    zombie = fork.Process(target=first, args=(queue,))
    zombie.start()
    while psutil.Process(zombie.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert 7 <= steps() < 40
    on_ranks(1, lambda ranks: [run(each) for each in (config, whole)] and None)
    assert losses(config) == losses(whole)
    before = content(folder_of(config).path)
    os.kill(zombie.pid, signal.SIGCONT)
    assert "has taken over this run" in queue.get(timeout=60)
    zombie.join()
    assert content(folder_of(config).path) == before


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
