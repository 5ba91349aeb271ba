"""Text from a run's newest checkpoint, and mistakes about the run."""

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
OPTIONS = [
    "runtime=inline",
    "model.layers=[gla]",
    "model.depth=1",
    "model.width=32",
    "model.heads=2",
    "train.steps=30",
    "train.sequence_length=64",
    "train.batch_size=4",
    "data=text",
    "tracking.mode=disabled",
    "sample.tokens=0",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the sea, the sky, the land.\n" * 200)
    places = [f"data.path={folder / 'text.txt'}", f"data.cache_dir={folder / 'cache'}", f"output_dir={folder / 'run'}"]
    result = start("pretrain.py", folder, *OPTIONS, *places)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def start(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(LAUNCH / program), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.all
def test_the_same_seed_writes_the_same_text(finished, tmp_path):
    wish = [f"run={finished}", "prompt='the '", "tokens=20"]
    texts = [start("generate.py", tmp_path, *wish, f"seed={seed}").stdout for seed in (1, 1, 2)]
    assert texts[0].startswith("the ")
    assert len(texts[0]) >= 20
    assert texts[0] == texts[1] != texts[2]
    assert list(tmp_path.iterdir()) == []
