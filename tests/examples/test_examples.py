"""Every example runs; those of conversion and of a tokenizer do in tests/docs."""

import runpy
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

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


def test_what_starts_clusters_can_be_read():
    folder = EXAMPLES.parent / "launch" / "clusters"
    scripts = sorted(folder.glob("*.sh"))
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    job = yaml.safe_load((folder / "rayjob.yaml").read_text())
    words = job["spec"]["entrypoint"].split()
    assert (job["kind"], words[:2]) == ("RayJob", ["python", "launch/pretrain.py"])
    assert (EXAMPLES.parent / words[1]).exists()
