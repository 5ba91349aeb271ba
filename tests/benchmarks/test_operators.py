"""The benchmarks of operators and of All-Scan: tiny runs tell of every contender its bytes, times, spread and ratio."""

import json

import pytest

from tests.command_cases import run_command


@pytest.mark.all
def test_every_operator_is_compared_in_both_directions_and_rivals_for_gpus_are_named(tmp_path):
    sizes = ("tokens=[64,128]", "heads=2", "key_width=8", "value_width=8", "window=16")
    how = ("rounds=2", "threads=1", "beside=[chunked]", "busy=true", f"output_dir={tmp_path}")
    done = run_command("bench-operators", *sizes, *how)
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "bench_operators.json").read_text())
    for words in ("device ", "threads 1", "commit ", "torch ", "B=1 H=2 K=8 V=8 float32", "tokens direction", "ratio"):
        assert words in done.out
    assert "gemm_limit of float32 by" in done.out
    assert (tmp_path / "bench_operators.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "bench_operators.png") in done.out
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
    gpu = {"fla_gated_delta_rule", "fla_simple_gla", "fla_gla", "fla_kda", "fla_hgrn", "flash_attn"}
    assert {name for name, reason in report["skipped"].items() if reason == "is for cuda"} == gpu


@pytest.mark.all
def test_lists_are_swept_each_with_each(tmp_path):
    sizes = ("tokens=32", "heads=2", "key_width=8", "value_width=[0,4]", "dtype=[float32,bfloat16]", "rounds=1")
    done = run_command("bench-operators", *sizes, "operators=[diagonal_scan]", "threads=[1]", f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "bench_operators.json").read_text())["rows"]
    points = {(row["heads"], row["key_width"], row["value_width"], row["dtype"]) for row in rows}
    assert points == {(2, 8, v, dtype) for v in (8, 4) for dtype in ("float32", "bfloat16")}
    assert len(list(tmp_path.glob("bench_operators_*.png"))) == 4


def bench(folder, *settings):
    done = run_command("bench-all-scan", *settings, "width=16", "rounds=1", f"output_dir={folder}")
    assert done.status == 0, done.err
    assert (folder / "all_scan.png").read_bytes().startswith(b"\x89PNG")
    return done.out, json.loads((folder / "all_scan.json").read_text())["rows"]


@pytest.mark.full
def test_every_method_is_measured_over_every_rank_count_and_form(tmp_path):
    printed, rows = bench(tmp_path, "ranks=[2,3]", "state_kib=[6]", "tokens=8", "form=[dense,channel]")
    found = {}
    for row in rows:
        found.setdefault((row["ranks"], row["form"]), {})[row["method"].split(" = ")[0]] = row
        assert row["median_ms"] >= row["minimum_ms"] > 0
    assert set(found) == {(ranks, form) for ranks in (2, 3) for form in ("dense", "channel")}
    ours = {"auto", "tree", "all_gather", "ring", *(f"pipeline {n}" for n in (1, 2, 4, 8, 16, 32, 64))}
    theirs = {"their all-gather", "their ring", "their all-to-all, 8 tokens"}
    for methods in found.values():
        assert set(methods) == ours | theirs  # 6 heads divide by 2 and by 3
    assert printed.count("of the best fixed choice") == 4
    # Payloads are those of the methods.
    state, transition = 4 * 6 * 16 * 16, 4 * 6 * 16 * 16
    sizes = {row["method"]: row["payload_bytes"] for row in rows if (row["ranks"], row["form"]) == (3, "dense")}
    assert sizes["pipeline 4"] == sizes["their ring"] == sizes["ring"] == state
    assert sizes["all_gather"] == 2 * state + transition
    assert sizes["their all-gather"] == 2 * (state + transition)
    # Of q, k, v and out, 8 tokens of 6 heads and 16 channels, two thirds come from others.
    assert sizes["their all-to-all, 8 tokens"] == 4 * 8 * 6 * 16 * 4 * 2 // 3


@pytest.mark.all
def test_a_model_makes_one_scan_a_layer_and_direction(tmp_path):
    _, rows = bench(tmp_path, "ranks=[2]", "compute_ms=1", "state_kib=[1]", "layers=3")
    scans = {row["method"].split(": ")[1]: row["scans"] for row in rows}
    assert scans.pop("compute alone") == 0
    overlapped = {"auto", "pipeline", "tree", "all_gather", "ring"}
    assert set(scans) == overlapped | {"auto, not overlapped", "auto, a barrier a layer"}
    assert set(scans.values()) == {2 * 3}
    assert all(row["compute_ms"] >= 2 * 3 * 1 for row in rows)


def test_schedules_that_cannot_win_are_left_out(tmp_path):
    _, rows = bench(tmp_path, "ranks=[3]", "state_kib=[64]", "form=[none]", "within=1", "only=[auto,pipe,ring]")
    assert sum(row["method"].startswith("auto") for row in rows) == 1
    assert all(row["method"].startswith(("auto", "pipe", "ring")) for row in rows)
    fixed = [row["model_ms"] for row in rows if not row["method"].startswith("auto")]
    assert len(fixed) < 8
    assert len(set(fixed)) <= 1


@pytest.mark.all
def test_scans_take_turns_with_those_of_a_commit_and_every_message_is_told(tmp_path):
    done = run_command(
        "bench-all-scan", "against=HEAD", "ranks=[2,3]", "state_kib=[4]", "width=16", "form=[head]", "rounds=2",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "all_scan_against.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [2, 3]
    assert all(row[side]["median_ms"] >= row[side]["minimum_ms"] > 0 for row in rows for side in ("here", "there"))
    for told in (tmp_path / "all_scan_timeline.txt").read_text().split("\nhere\n"):
        deeds = [line.split() for line in told.splitlines() if line[:4].strip().isdigit()]
        moved = {
            what: [(int(d[0]), int(d[2]), int(d[3])) for d in deeds if d[1] == what] for what in ("send", "receive")
        }
        assert sorted(moved["send"]) == sorted((peer, rank, size) for rank, peer, size in moved["receive"])
        assert sum(size for rank, _, size in moved["receive"] if rank == 1) == 4096
        assert {rank for rank, _, _ in moved["receive"]} == {1, 2}
    assert (tmp_path / "all_scan_timeline.png").read_bytes().startswith(b"\x89PNG")
