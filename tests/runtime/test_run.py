"""Whole runs in one process: what the folder holds afterwards, whose it is, how signals end a run."""

import json
import os
import re
import signal
import threading
import time

import pytest
import yaml

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.runtime import run, signals
from seqtrain.runtime.tracking import tracking_id
from tests.command_cases import refused
from tests.runtime.runtime_cases import change, folder_of, losses, on_ranks, records, small_config


def run_alone(config) -> dict:
    """`run` in a process of its own, where signals reach its main thread."""
    return on_ranks(1, lambda ranks: run(config))[0]


def content(folder) -> dict[str, float]:
    """When each file was last written; but for wandb's own log, which its process writes when it likes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("run"), evaluation={"every": 2, "max_tokens": 200})
    return config, run_alone(config)


def test_what_a_run_leaves(finished):
    config, summary = finished
    folder = folder_of(config)
    assert json.loads(folder.summary.read_text()) == summary
    assert summary["steps"] == 6
    assert summary["restarts"] == summary["skipped_steps"] == summary["stopped_by_signal"] == 0
    assert not summary["stopped"]
    assert summary["peak_memory_bytes"] > 10_000_000
    assert summary["tokens_per_second"] > 0
    assert 0 < summary["bigram_bits_per_byte"] < summary["held_out_bits_per_byte"] < 8.5
    assert summary["sample"].startswith("state")
    scores = [record.get("held_out_bits_per_byte") for record in records(config)]
    assert [score is not None for score in scores] == [False, True] * 3
    assert scores[-1] == summary["held_out_bits_per_byte"]
    assert folder.loss_curve.read_bytes().startswith(b"\x89PNG")
    stored = yaml.safe_load(folder.config.read_text())
    assert stored["optimizer"]["lr"] == 0.01
    assert stored["mixer"].keys() == {"linear_attention"}
    log = folder.log.read_text()
    assert len(re.findall("linear_attention: (?:native|chunked)", log)) == 1, "a choice of backend is logged once"
    files = {"config.yaml", "metrics.jsonl", "summary.json", "loss.png", "run.log", "starts.jsonl"}
    assert {path.name for path in folder.path.iterdir()} == {*files, "checkpoints"}


@pytest.mark.all
def test_the_tracking_id_is_kept_across_calls(tmp_path):
    config = small_config(tmp_path, train={"steps": 3}, tracking={"mode": "offline"})
    run_alone(config)
    folder = folder_of(config)
    [stored] = {json.loads(path.read_text())["tracking_id"] for path in folder.checkpoints.glob("*/manifest.json")}
    [run_folder] = (folder.path / "wandb").glob("offline-run-*")
    assert run_folder.name.endswith(stored)
    assert tracking_id(config, folder) == stored
    assert tracking_id(change(config, tracking={"mode": "disabled"}), folder) == ""


def test_a_finished_run_is_not_done_again(finished):
    config, summary = finished
    before = losses(config)
    assert run_alone(config) == summary
    assert losses(config) == before


REFUSED = [
    ({"optimizer": {"lr": 0.5}}, "holds a run with optimizer.lr=0.01, now 0.5; use another output_dir"),
    ({"train": {"steps": 9}}, "holds a run with train.steps=6, now 9"),
    ({"seed": 3}, "holds a run with seed=1, now 3"),
    ({"checkpoint": {"resume": "never"}}, "holds a run already; use checkpoint.resume=auto"),
    ({"checkpoint": {"resume": "/none"}, "output_dir": "fresh"}, "checkpoint.resume=/none: no such folder"),
]


def test_a_folder_of_another_run_is_left_alone(finished, monkeypatch, tmp_path):
    config, _ = finished
    monkeypatch.chdir(tmp_path)
    before = content(folder_of(config).path)

    def refuse_all(ranks) -> None:
        for sections, message in REFUSED:
            with refused(message, CheckpointError if "output_dir" in sections else ConfigError):
                run(change(config, **sections))

    on_ranks(1, refuse_all)
    assert content(folder_of(config).path) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.all
def test_a_signal_saves_then_stops_and_the_next_call_resumes(tmp_path):
    config = small_config(tmp_path, train={"steps": 150}, checkpoint={"every": 0})

    def interrupted(ranks) -> dict:
        def interrupt() -> None:
            while len(records(config)) < 5:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        return run(config)

    [summary] = on_ranks(1, interrupted)
    assert summary["stopped"]
    assert summary["stopped_by_signal"] == signal.SIGINT
    assert 5 <= summary["steps"] < 150
    assert [path.name for path in folder_of(config).checkpoints.iterdir()] == [f"step-{summary['steps']:08d}"]
    again = run_alone(config)
    assert not again["stopped"]
    assert [record["step"] for record in records(config)] == list(range(1, 151))
    whole = change(config, "whole")
    run_alone(whole)
    assert losses(config) == losses(whole)


def test_a_second_sigint_aborts_at_once(tmp_path):
    with signals.listening(tmp_path / "stop") as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_requested()
        assert (tmp_path / "stop").exists()
        assert received.number == signal.SIGINT
        # The same key press, passed on by a parent.
        os.kill(os.getpid(), signal.SIGINT)
        received.seconds -= 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not signals.stop_requested()
    assert signals.stop_requested(tmp_path / "stop")


@pytest.mark.all
def test_torchrun_s_ranks_train_together(tmp_path):
    config = small_config(tmp_path, parallel={"data": 2})
    summary, nothing = on_ranks(2, lambda ranks: run(config))
    assert nothing == {}
    assert summary["steps"] == 6
    assert "all_scan: measured" not in folder_of(config).log.read_text(), "only where a sequence is cut"
