"""The benchmark of the operators: a tiny run tells of every contender its time, spread and ratio; wrong keys end it."""

import json

import pytest

from tests.command_cases import run_command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    sizes = ("tokens=[64,128]", "heads=2", "key_width=8", "value_width=8", "window=16")
    how = ("rounds=3", "threads=1", "beside=[chunked]", "busy=true", f"output_dir={folder}")
    done = run_command("bench-operators", *sizes, *how)
    assert done.status == 0, done.err
    return done.out, json.loads((folder / "bench_operators.json").read_text()), folder


@pytest.mark.all
def test_every_operator_is_compared_in_both_directions(tiny):
    _, report, _ = tiny
    operators = report["settings"]["operators"]
    rivals = {("delta_rule", "hf_qwen3_next"), ("scalar_decay", "hf_mamba2")}
    rivals |= {(name, f"{name} gemm_limit") for name in ("delta_rule", "scalar_decay", "channel_decay")}
    rivals |= {(name, against) for name in operators for against in ("sdpa", f"{name} chunked")}
    absent = {pair for pair in rivals if pair[1] in report["skipped"]}
    idle = {(name, f"{name} idle") for name in operators}
    came = [(row["tokens"], row["direction"], row["busy"], row["operator"], row["against"]) for row in report["rows"]]
    expected = {
        (tokens, direction, busy, *pair)
        for tokens in (64, 128)
        for direction in ("forward", "forward+backward")
        for busy in (False, True)
        for pair in (rivals | idle if busy else rivals) - absent
    }
    assert len(operators) == 7
    assert len(came) == len(set(came))
    assert set(came) == expected
    for row in report["rows"]:
        assert min(row["ours_ms"], row["theirs_ms"]) > 0
        assert min(row["ours_spread_ms"], row["theirs_spread_ms"]) >= 0
        assert row["ratio"] == pytest.approx(row["theirs_ms"] / row["ours_ms"])


@pytest.mark.all
def test_on_a_cpu_the_rivals_that_need_a_gpu_are_named(tiny):
    _, report, _ = tiny
    gpu = {"fla_gated_delta_rule", "fla_simple_gla", "fla_gla", "fla_kda", "fla_hgrn", "flash_attn"}
    assert {name for name, reason in report["skipped"].items() if reason == "is for cuda"} == gpu


def test_lists_are_swept_each_with_each(tmp_path):
    sizes = ("tokens=32", "heads=2", "key_width=8", "value_width=[0,4]", "dtype=[float32,bfloat16]", "rounds=1")
    done = run_command("bench-operators", *sizes, "operators=[diagonal_scan]", "threads=[1]", f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "bench_operators.json").read_text())["rows"]
    points = {(row["heads"], row["key_width"], row["value_width"], row["dtype"]) for row in rows}
    assert points == {(2, 8, v, dtype) for v in (8, 4) for dtype in ("float32", "bfloat16")}
    assert len(list(tmp_path.glob("bench_operators_*.png"))) == 4


@pytest.mark.all
def test_what_is_printed_names_machine_shapes_and_columns(tiny):
    printed, _, folder = tiny
    machine = ("device ", "threads 1", "commit ", "torch ")
    for words in (*machine, "B=1 H=2 K=8 V=8 float32", "gemm_limit of float32 by", "tokens direction", "ratio"):
        assert words in printed
    assert (folder / "bench_operators.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "bench_operators.png") in printed
