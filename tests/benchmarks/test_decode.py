"""The benchmark of decoding: both sides give the same logits, and what is printed follows from what was measured."""

import json

import pytest

from seqtrain.kernels.native.build import unavailable
from tests.command_cases import run_command

SMALL = ("width=64", "depth=4", "vocab=512", "rounds=3", "context=[20]", "weights=[float32,int8]")


@pytest.mark.skipif(unavailable() is not None, reason="needs the native library")
def test_steps_in_turns(tmp_path):
    pytest.importorskip("torchao")
    done = run_command("bench-decode", *SMALL, "batch=[1,3]", f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "bench_decode.json").read_text())["rows"]
    assert [(row["weights"], row["batch"]) for row in rows] == [(w, b) for w in ("float32", "int8") for b in (1, 3)]
    for row in rows:
        assert row["planned"]
        assert set(row["sides"]) == {"ours", "reading"} | ({"transformers"} if row["weights"] == "float32" else set())
        assert len(row["rounds"]["ours"]) == 3
        assert min(side["cpu"] for side in row["sides"].values()) > 0
    whole, integers = rows[0]["bytes"], rows[2]["bytes"]
    assert whole / 4 < integers < whole / 2
    assert "of limit" in done.out


def test_an_unknown_family(tmp_path):
    done = run_command("bench-decode", "family=lama", f"output_dir={tmp_path}")
    assert done.status == 2
    assert done.err.startswith("error: family: family 'lama' is unknown; did you mean 'llama'?")
