"""The benchmark of All-Scan: tiny runs on ranks of its own tell of every method its bytes, times and ratio."""

import json

import pytest

from tests.command_cases import run_command


def bench(folder, *settings):
    done = run_command("bench-all-scan", *settings, "width=16", "rounds=1", f"output_dir={folder}")
    assert done.status == 0, done.err
    assert (folder / "all_scan.png").read_bytes().startswith(b"\x89PNG")
    return done.out, json.loads((folder / "all_scan.json").read_text())["rows"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    small = ("ranks=[2,3]", "state_kib=[6]", "tokens=8", "form=[dense,channel]")
    return bench(tmp_path_factory.mktemp("scans"), *small)


@pytest.mark.all
def test_every_method_is_measured_over_every_rank_count_and_form(scans):
    printed, rows = scans
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


@pytest.mark.all
def test_payloads_are_those_of_the_methods(scans):
    state, transition = 4 * 6 * 16 * 16, 4 * 6 * 16 * 16
    sizes = {row["method"]: row["payload_bytes"] for row in scans[1] if (row["ranks"], row["form"]) == (3, "dense")}
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
