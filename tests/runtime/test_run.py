"""Whole runs in one process: what the folder holds afterwards, whose it is, how signals end a run."""

import json
import os
import re
import signal
import struct
import threading
import time
from contextlib import closing

import pytest
import torch
import yaml
from tensorboardX.proto.event_pb2 import Event

import seqtrain
from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.models import LanguageModel
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime import run, signals
from seqtrain.runtime.resume import differences
from seqtrain.runtime.tracking import TensorBoard, tracking_id
from seqtrain.testing import relative_error
from tests.command_cases import refused, run_command
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
    assert {path.name for path in folder.path.iterdir()} == {*files, "checkpoints", ".epochs"}
    assert sorted(path.name for path in folder.epochs.iterdir()) == ["000002", "saved"]


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
    ({"optimizer": {"lr": 0.5}}, "holds a run with optimizer.lr=0.01, now 0.5; resume it with these values as they"),
    ({"train": {"steps": 9}}, "holds a run with train.steps=6, now 9"),
    ({"seed": 3}, "output_dir=NEW checkpoint.resume="),
    ({"seed": 3, "train": {"batch_size": 4}}, "holds a run with train.batch_size=8, now 4; seed=1, now 3"),
    ({"checkpoint": {"resume": "never"}}, "holds a run already; use checkpoint.resume=auto"),
    ({"checkpoint": {"resume": "/none"}, "output_dir": "fresh"}, "checkpoint.resume=/none: no such folder"),
]


def test_a_folder_of_another_run_is_left_alone(finished, monkeypatch, tmp_path):
    config, _ = finished
    monkeypatch.chdir(tmp_path)
    kept_by_hand = folder_of(config).checkpoints / "step-best"
    kept_by_hand.mkdir()
    before = content(folder_of(config).path)

    def refuse_all(ranks) -> None:
        for sections, message in REFUSED:
            with refused(message, CheckpointError if "output_dir" in sections else ConfigError):
                run(change(config, **sections))

    on_ranks(1, refuse_all)
    assert content(folder_of(config).path) == before
    assert list(tmp_path.iterdir()) == []
    kept_by_hand.rmdir()


def test_a_loaded_run_is_its_newest_checkpoint(finished):
    config, _ = finished
    loaded = seqtrain.load(config.output_dir)
    assert loaded.config.model == config.model
    weights = {name: value for name, value in loaded.model.state_dict().items() if name != "head.weight"}
    checkpoint = checkpoints.find(folder_of(config).checkpoints)
    again = LanguageModel(config.model, config.mixer, loaded.tokenizer.vocab_size)
    checkpoint.load_weights(again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    with refused(f"{config.data.path}: is neither a run"):
        seqtrain.load(config.data.path)


def test_an_exported_run_is_the_same_model_to_transformers(finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, _ = finished
    words = (f"run={config.output_dir}", f"output_dir={tmp_path / 'exported'}")
    assert run_command("export", *words).status == 0
    assert "exists already" in run_command("export", *words).err
    other = (f"run={config.output_dir}", f"output_dir={tmp_path / 'other'}", "as=llama")
    assert "as=llama: the model can't be exported as one: it has no softmax layers" in run_command("export", *other).err
    ours, again = seqtrain.load(config.output_dir), seqtrain.load(tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "state \t decay\n\n\u00fc"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens[0].tolist() == ours.tokenizer.encode(text) == again.tokenizer.encode(text)
    assert tokenizer.decode(tokens[0]) == text
    with torch.no_grad():
        expected = ours.model(tokens, all_logits=True)[0]
        assert relative_error(model(tokens).logits, expected) < 1e-5
        assert relative_error(again.model(tokens, all_logits=True)[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "allowed"),
    [
        # Both rise over ten steps, and fall after the 50th.
        ("wsd", {"steps": 200, "warmup_fraction": 0.05, "decay_fraction": 0.1}, True),
        # They rise over 10 and 20, or 60.
        ("wsd", {"steps": 200}, True),
        ("wsd", {"steps": 600}, False),
        ("cosine", {"steps": 200, "warmup_fraction": 0.05}, False),
        ("cosine", {}, True),
    ],
)
def test_a_run_is_made_longer_where_its_learning_rates_stay(name, changes, allowed):
    def values(steps=100, warmup_fraction=0.1, decay_fraction=0.5):
        schedule = {"name": name, "warmup_fraction": warmup_fraction, "final_lr_ratio": 0.1}
        schedule |= {"decay_fraction": decay_fraction} if name == "wsd" else {}
        return {"schedule": schedule, "train": {"steps": steps, "batch_size": 2}, "optimizer": {"lr": 1.0}}

    assert (differences(values(), values(**changes), steps_done=50) == []) == allowed
    # Of what forms the numbers otherwise, everything counts.
    other = values(**changes) | {"optimizer": {"lr": 1.0, "eps": 1.0}}
    assert "optimizer.eps=null, now 1.0" in differences(values(), other, steps_done=50)


def test_tensorboard_gets_every_number_of_a_record(tmp_path):
    with closing(TensorBoard(tmp_path)) as board:
        board.log({"step": 3, "loss": 1.5, "lr": None})
        board.log({"step": 4, "loss": 1.25})
    [file] = tmp_path.iterdir()
    found = [(event.step, value.tag, value.simple_value) for event in events(file) for value in event.summary.value]
    assert found == [(3, "loss", 1.5), (4, "loss", 1.25)]


def events(file):
    """The events of a file for TensorBoard: a length, its checksum, the event, its checksum."""
    content, place = file.read_bytes(), 0
    while place < len(content):
        [length] = struct.unpack_from("<Q", content, place)
        yield Event.FromString(content[place + 12 : place + 12 + length])
        place += 16 + length


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
