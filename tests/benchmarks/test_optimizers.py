"""The comparison of optimizers: rates tuned, equal steps, equal seconds, and nothing run twice."""

import json
from pathlib import Path

import pytest

from seqtrain.benchmarks import optimizers
from tests.command_cases import run_command

# Seconds of a step; bits per byte after few steps at the best rate, and what each step takes off.
SPEED = {"adamw": 1.0, "muon": 2.0}
BITS = {"adamw": 3.0, "muon": 2.8}
BEST = {"adamw": 3e-3, "muon": 3e-4}


def pretend(started):
    """Stands in for runs of launch/pretrain.py: leaves what one leaves."""

    def start(overrides):
        given = dict(word.split("=", 1) for word in overrides)
        name, rate, steps = given["optimizer"], float(given["optimizer.lr"]), int(given["train.steps"])
        started.append((name, rate, int(given["seed"]), steps))
        folder = Path(given["output_dir"])
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step + 1, "step_seconds": SPEED[name]}) for step in range(steps)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        bits = BITS[name] - steps / 100 + (rate != pytest.approx(BEST[name])) + int(given["seed"]) / 1000
        (folder / "summary.json").write_text(json.dumps({"held_out_bits_per_byte": bits}))

    return start


def processor(started):
    """Stands in for the processor's time of what was started: 7 s each, and each step but the first."""
    return lambda _: (sum(7 + (steps - 1) * SPEED[name] for name, _, _, steps in started), 0.0)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_equal_steps_and_equal_seconds(clock, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(optimizers, "start", pretend(started))
    monkeypatch.setattr(optimizers.resource, "getrusage", processor(started))
    common = "common=[train.steps=20,runtime=inline]"
    words = ["optimizers=[adamw,muon]", "factors=[0.1,1]", "seeds=[0,1]", common, f"clock={clock}"]
    done = run_command("compare-optimizers", *words, f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "results.json").read_text())
    adamw, muon = results["rows"]
    assert (adamw["rate"], muon["rate"]) == (pytest.approx(3e-3), pytest.approx(3e-4))
    assert (adamw["timed_steps"], muon["timed_steps"], muon["seconds"]) == (20, 10, 20.0)
    assert muon["bits"] == pytest.approx([2.6, 2.601])
    assert muon["timed_bits"] == pytest.approx([2.7, 2.701])
    assert "muon beats adamw at equal seconds by 3.6% over 2 seeds, 20 s of steps each" in done.out
    # Two of each tuned, two at equal steps, and muon's two at equal seconds: adamw's are those at equal steps. By the
    # processor's time one run of one step for each beside them.
    runs = 12 if clock == "cpu" else 10
    assert len(started) == len(set(started)) == runs
    assert (tmp_path / "optimizers.png").read_bytes()[:4] == b"\x89PNG"
    assert "muon beats adamw" in (tmp_path / "report.html").read_text()
    again = run_command("compare-optimizers", *words, "margin=0.05", f"output_dir={tmp_path}")
    assert "none beats adamw at equal seconds by 5%; the best, muon, needs -3.6%" in again.out
    assert len(started) == runs, "what is done is not done again"


def test_the_processors_time_of_other_processes_is_refused(tmp_path):
    done = run_command("compare-optimizers", "clock=cpu", "common=[runtime=ray]", f"output_dir={tmp_path}")
    assert done.status == 2
    assert "clock=cpu" in done.err


@pytest.mark.full
def test_real_runs(tmp_path):
    sizes = "model.depth=1,model.width=16,model.heads=2,train.sequence_length=32,train.batch_size=2,runtime=inline"
    common = f"common=[train.steps=3,{sizes},parallel.data=1,evaluation.max_tokens=512]"
    words = ["optimizers=[adamw,muon]", "factors=[1]", "seeds=[0]", common]
    done = run_command("compare-optimizers", *words, f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    assert "adamw" in done.out
