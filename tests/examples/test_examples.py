"""Every example runs; those of conversion and of a tokenizer do in tests/docs."""

import runpy
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from seqtrain.parallel.testing import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_one_operator(capsys):
    runpy.run_path(str(EXAMPLES / "operators.py"))
    assert "gradient of q" in capsys.readouterr().out


@pytest.mark.all
def test_one_sequence_over_two_ranks(capfd):
    """In forked ranks, which have the group already that it would form under torchrun."""

    def on_rank(rank):
        dist.init_process_group = lambda backend: None
        runpy.run_path(str(EXAMPLES / "two_ranks.py"), run_name="__main__")

    run_ranks(2, on_rank)
    lines = capfd.readouterr().out.splitlines()
    differences = [float(line.rpartition(" ")[2]) for line in lines if "largest difference" in line]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_the_shell_examples_are_valid():
    for script in EXAMPLES.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
