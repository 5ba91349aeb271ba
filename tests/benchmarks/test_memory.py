"""A process's peak memory: a small model's step is measured, and checkpointing and the limit do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A process's peak never falls: every measurement needs a process of its own.
TOOL = Path(__file__).parents[2] / "tools" / "measure_memory.py"
SMALL = ("tokens=2048", "layers=[gla]", "depth=4", "width=64", "heads=2", "vocab_size=100", "threads=1")


def run(*arguments, status=0):
    done = subprocess.run([sys.executable, TOOL, *SMALL, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.all
def test_it_says_what_a_step_took_and_that_it_was_too_much():
    done, result = run("documents=3", "depth=1", "limit_gib=0.01", status=1)
    assert result["peak_bytes"] >= result["peak_bytes_before"] > 50 * 2**20
    assert result["tokens_per_second"] * result["seconds"] > 2047
    # Loss of a model that knows nothing: about log(vocabulary).
    assert 4 < result["loss"] < 6
    assert "peak memory" in done.stdout
    assert "above limit_gib=0.01" in done.stderr


@pytest.mark.all
def test_checkpointing_takes_less_memory():
    _, kept = run("activation_checkpointing=false", "tokens=8192", "depth=8")
    _, recomputed = run("activation_checkpointing=true", "tokens=8192", "depth=8")
    grown = [result["peak_bytes"] - result["peak_bytes_before"] for result in (kept, recomputed)]
    assert grown[1] < 0.8 * grown[0], grown
    assert kept["parameters"] == recomputed["parameters"]
