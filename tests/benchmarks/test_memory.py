"""A process's peak memory: a small model's step is measured, and checkpointing and the limit do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A process's peak never falls: every measurement needs a process of its own.
TOOL = Path(__file__).parents[2] / "tools" / "measure_memory.py"
SMALL = ("layers=[gla]", "width=64", "heads=2", "vocab_size=100", "threads=1")


def run(*arguments, status=0):
    done = subprocess.run([sys.executable, TOOL, *SMALL, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_a_step_is_measured_held_to_a_limit_and_less_with_checkpointing():
    sizes = ("tokens=2048", "depth=6", "documents=3")
    done, kept = run(*sizes, "activation_checkpointing=false", "limit_gib=0.01", status=1)
    assert "peak memory" in done.stdout
    assert "above limit_gib=0.01" in done.stderr
    _, recomputed = run(*sizes, "activation_checkpointing=true")
    for result in (kept, recomputed):
        assert result["peak_bytes"] >= result["peak_bytes_before"] > 50 * 2**20
        assert result["tokens_per_second"] * result["seconds"] > 2047
        # Loss of a model that knows nothing: about log(vocabulary).
        assert 4 < result["loss"] < 6
    grown = [result["peak_bytes"] - result["peak_bytes_before"] for result in (kept, recomputed)]
    assert grown[1] < 0.8 * grown[0], grown
    assert kept["parameters"] == recomputed["parameters"]
