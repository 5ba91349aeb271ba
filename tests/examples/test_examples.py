"""Every example runs as its docstring says."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_one_operator(capsys):
    runpy.run_path(str(EXAMPLES / "operators.py"))
    assert "gradient of q" in capsys.readouterr().out


@pytest.mark.all
def test_one_sequence_over_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(EXAMPLES / "two_ranks.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    differences = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if "largest difference" in line]
    assert len(differences) == 2
    assert max(differences) < 1e-5


@pytest.mark.all
def test_a_conversion_from_end_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "convert_tiny.py"), str(tmp_path)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "converted" / "report.md").exists()


def test_the_shell_examples_are_valid():
    for script in EXAMPLES.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
