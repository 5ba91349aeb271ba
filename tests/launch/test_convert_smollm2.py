"""The conversion of a real model, on request: it takes twenty minutes on two cores, and downloads 90 MB."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not os.environ.get("SEQTRAIN_TEST_SMOLLM2"), reason="asked for by SEQTRAIN_TEST_SMOLLM2=1")
@pytest.mark.timeout(3600)
def test_smollm2_comes_back_towards_its_teacher(tmp_path):
    words = ["target=gla", "layer.memory_weight=0.9", "recipe=transfer_then_kl", f"output_dir={tmp_path}"]
    subprocess.run([ROOT / "launch" / "convert_smollm2", *words], check=True, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    failed = [check for check in report["checks"] if not check["passed"]]
    assert report["checks"]
    assert not failed
