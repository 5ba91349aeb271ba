"""The benchmark of training steps: both sides compute the same loss, what is printed follows from what was measured."""

import json

import pytest

from tests.command_cases import run_command

SMALL = ("tokens=[40,80]", "width=64", "depth=4", "vocab=100", "rounds=1")


@pytest.mark.parametrize("families", [["llama"], pytest.param(["qwen3_next", "mamba2"], marks=pytest.mark.all)])
def test_steps_in_turns(tmp_path, families):
    done = run_command("bench-training", f"families=[{','.join(families)}]", *SMALL, f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "bench_training.json").read_text())["rows"]
    keys = [(family, dtype, tokens) for family in families for dtype in ("float32", "bfloat16") for tokens in (40, 80)]
    assert [(row["family"], row["dtype"], row["tokens"]) for row in rows] == keys
    for row in rows:
        ours, theirs = row["sides"]["ours"], row["sides"]["transformers"]
        assert row["ratio"] == theirs["cpu"] / ours["cpu"]
        rate = max(row["gemm_flops_per_second"].values())
        assert row["share"] == pytest.approx(row["flops"] / ours["cpu"] / rate)
        assert min(ours["cpu"], ours["wall"], rate, ours["bytes"]) > 0
    assert (tmp_path / "bench_training.png").stat().st_size > 10_000


def test_a_side_that_takes_too_long_is_left_out_of_longer_rows(tmp_path):
    more = ("families=llama", "dtype=float32", "seconds=0.0001", f"output_dir={tmp_path}")
    done = run_command("bench-training", *SMALL, *more)
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "bench_training.json").read_text())["rows"]
    assert [set(row["sides"]) for row in rows] == [{"ours", "transformers"}, set()]
    assert rows[1]["ratio"] is rows[1]["share"] is None


def test_an_unknown_family(tmp_path):
    done = run_command("bench-training", "families=[lama]", f"output_dir={tmp_path}")
    assert done.status == 2
    assert done.err.startswith("error: families: family 'lama' is unknown; did you mean 'llama'?")
