"""The comparison of recipes: equal tokens, equal seconds, one yardstick, and nothing run twice."""

import json
from pathlib import Path

import pytest

from seqtrain.benchmarks import recipes
from tests.command_cases import run_command

# Seconds of a thousand tokens, and perplexity after any training, of a start of 20 and a teacher's 10.
SPEED = {"transfer_then_kl": 1.0, "radlads": 4.0}


def pretend(started):
    """Stands in for launch/convert.py: leaves what one leaves, better the more tokens it had."""

    def start(overrides):
        given = dict(word.split("=", 1) for word in overrides)
        name, folder = given["recipe"], Path(given["output_dir"])
        steps = {word.split(".")[2]: int(value) for word, value in given.items() if word.endswith(".steps")}
        lengths = {word.split(".")[2]: int(value) for word, value in given.items() if word.endswith("sequence_length")}
        tokens = {stage: steps[stage] * lengths[stage] for stage in steps}
        started.append((name, tokens, overrides))
        for stage, count in tokens.items():
            (folder / "training" / stage).mkdir(parents=True)
            record = {"step": 1, "step_seconds": count / 1000 * SPEED[name]}
            (folder / "training" / stage / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        value = 20 - sum(tokens.values()) / 2000 if tokens else 25.0
        perplexity = {"teacher": 10.0, "student": value, "student, memory off": 20.0}
        position = [{"from": 1, "to": 64, **perplexity}, {"from": 64, "to": 128, **perplexity}]
        found = {"teacher": {"accuracy": 1.0}, "student": {"accuracy": 0.5}, "student, memory off": {"accuracy": 0.0}}
        report = {
            "layers": ["linearized_attention"] * 16,
            "kept": [1, 2],
            "config": {"target": given["target"]},
            "training": [{"run": stage, "tokens": count, "loss": {}} for stage, count in tokens.items()],
            "end": {
                "texts": {"prose": {"perplexity": perplexity, "by_position": position}},
                "recall": [{"tokens_between": distance, **found} for distance in json.loads(given["verify.recall"])],
            },
            "cache_bytes_float32": [{"student": 1}, {"student": 2**21}, {"student": 3}],
            "checks": [{"name": "a check", "passed": name != "radlads"}],
        }
        (folder / "report.json").write_text(json.dumps(report))

    return start


def test_equal_tokens_and_equal_seconds(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(recipes, "start", pretend(started))
    words = [
        "source=model",
        "recipes=[transfer_then_kl,radlads]",
        "tokens=8192",
        "longest=512",
        f"output_dir={tmp_path}",
    ]
    done = run_command("compare-recipes", *words)
    assert done.status == 0, done.err
    window, ours, theirs = json.loads((tmp_path / "results.json").read_text())["rows"]
    # The yardstick is the start without its memory, whatever its memory does.
    assert (window["perplexity"]["prose"], window["gap"]["prose"], window["tokens"]) == (20.0, 0.0, 0)
    assert window["recall"] == {"64": 0.0, "128": 0.0, "256": 0.0, "512": 0.0}
    names = [name for name, _, _ in started]
    assert names == ["none", "transfer_then_kl", "radlads", "radlads"]
    # Each stage has its share of the tokens: 120 to 70 steps of 512, and 50, 125 and 48 (12 of 2048).
    assert started[1][1] == {"transfer": 5120, "kl": 3072}
    assert started[2][1] == {"align": 2048, "distill": 4608, "long": 1536}
    assert "layer.window=0" in started[2][2]
    assert "layer.window=64" not in started[2][2]
    assert ours["tokens"] == 8192
    assert ours["gap"]["prose"] == pytest.approx(0.4096)
    # Four times as slow: a quarter of the tokens.
    assert ours["timed_tokens"] == 8192
    assert theirs["timed_tokens"] == pytest.approx(8192 / 4, rel=0.3)
    assert theirs["failed"] == ["a check"]
    assert theirs["seconds"] == pytest.approx(theirs["tokens"] * 4 / 1000, abs=0.06)
    assert "radlads: FAILED a check" in done.out
    assert (tmp_path / "recipes.png").read_bytes()[:4] == b"\x89PNG"
    assert "arXiv 2505.03005" in (tmp_path / "report.html").read_text()
    run_command("compare-recipes", *words)
    assert len(started) == 4, "what is done is not done again"


def test_a_budget_of_layers_follows_the_depth(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(recipes, "start", pretend(started))
    monkeypatch.setitem(SPEED, "recall", 1.0)
    done = run_command("compare-recipes", "source=model", "recipes=[recall]", "timed=false", f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    assert "keep=budget:2" in started[1][2]


def test_an_unknown_recipe_is_one_line(tmp_path):
    done = run_command("compare-recipes", "source=model", "recipes=[radlad]", f"output_dir={tmp_path}")
    assert done.status == 2
    assert "did you mean 'radlads'" in done.err
