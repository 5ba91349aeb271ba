"""From what ranks measured to a report: sums, shares, spreads, and a trace."""

import pytest

from seqtrain.profiling import ProfileConfig, StepWork, by_kind, spread, summarize, trace_events


def part(kind, phase, layer, *seconds):
    return {"kind": kind, "phase": phase, "layer": layer, "seconds": list(seconds)}


def rank_profile(rank, scale=1.0):
    return {
        "rank": rank,
        "vocab_size": 11,
        "steps": {"warm-up": [9.0], "plain": [1.0, 2.0], "profiled": [1.0, 3.0]},
        "processor": {"plain": [0.5, 0.5], "profiled": [0.5, 0.6]},
        "parts": [
            part("gla", "forward", 0, 0.25, 0.5),
            part("gla", "forward", 1, 0.25, 0.5),
            part("gla", "backward", 0, 0.25 * scale, 1.0),
            part("gla", "recomputation", 0, 0.0, 0.25),
            part("communication", "scan", -1, 0.25 * (2 - scale), 0.5),
            part("other", "", -1, 0.0, 0.25),
        ],
        "hidden": [0.5, 0.5],
        "phases": {"checkpoint": [4.0], "evaluation": [1.0]},
        "peak_flops": 10.0,
        "memory": {"peak_bytes": 100 * (rank + 1), "samples": [1, 2]},
        "spans": [{"part": {"kind": "gla", "phase": "forward", "layer": 0}, "start": 1.0, "seconds": 0.5}],
        "in_flight": [[1.25, 1.75]],
    }


@pytest.fixture
def report():
    ranks = [rank_profile(0), rank_profile(1, scale=0.0)]
    return summarize(ranks, StepWork(30, 60.0, 90.0), checkpoint_every=8, step_seconds=[1.0, 3.0])


def test_parts_sum_to_the_step(report):
    assert report["sum_of_parts"] == pytest.approx(1.0)
    assert sum(row["seconds"] for row in report["parts"]) == pytest.approx(2.0)
    rows = {(row["kind"], row["phase"]): row for row in report["parts"]}
    forward = rows["gla", "forward"]
    assert (forward["seconds"], forward["share"]) == (0.75, 0.375)
    assert (forward["low"], forward["high"]) == (0.625, 0.875)
    backward = rows["gla", "backward"]
    assert (backward["least_rank"], backward["most_rank"]) == (0.5, 0.625)
    assert report["other"] == pytest.approx(0.125 / 2.0)
    assert len([row for row in report["layers"] if row["kind"] == "gla"]) == 4


def test_speed_is_that_of_the_steps_without_the_profiler(report):
    assert report["tokens_per_second"]["median"] == (30.0 + 15.0) / 2
    assert report["step_seconds"]["without_profiler"]["median"] == 1.5
    assert report["profiler_overhead"]["time"]["median"] == pytest.approx((0.0 + 0.5) / 2)
    assert report["profiler_overhead"]["processor"]["most"] == pytest.approx(0.2)
    assert report["warm_up_seconds"] == [9.0]


def test_flops_are_shares_of_the_peak_of_all_ranks(report):
    flops = report["flops"]
    assert flops["peak_per_second"] == 20.0
    assert flops["mfu"] == pytest.approx(60.0 / 1.5 / 20.0)
    assert flops["hfu"] == pytest.approx(90.0 / 1.5 / 20.0)


def test_communication_and_checkpoints(report):
    assert report["communication"] == {"exposed_seconds": pytest.approx(0.4375), "hidden_seconds": 0.5}
    assert report["checkpoint"] == {"seconds": 4.0, "every": 8, "seconds_per_step": 0.5}
    assert [memory["peak_bytes"] for memory in report["memory"]] == [100, 200]


def test_the_table_has_recomputation_and_kinds_of_communication_as_rows(report):
    rows = {row["part"]: row for row in by_kind(report["parts"])}
    assert set(rows) == {"gla", "recomputation", "communication: scan", "other"}
    assert (rows["gla"]["forward"], rows["gla"]["backward"]) == (0.75, 0.5625)
    assert rows["recomputation"]["seconds"] == 0.125
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(2.0)


def test_a_trace_has_one_process_per_rank():
    events = trace_events([rank_profile(0), rank_profile(1)])["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}
    own = [event for event in spans if event["pid"] == 0]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in own] == [
        ("gla forward", 0, 1e6, 0.5e6),
        ("in flight", 1, 1.25e6, 0.5e6),
    ]
    assert own[0]["args"] == {"layer": 0}


def test_the_plan_of_the_steps():
    plan = ProfileConfig(steps=3, warmup=2).plan()
    assert plan == ["warm-up"] * 2 + ["plain", "profiled", "profiled", "plain", "plain", "profiled", "memory"]
    assert len(plan) == ProfileConfig(steps=3, warmup=2).total_steps


def test_the_spread_of_one_value_is_that_value():
    assert set(spread([3.0]).values()) == {3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "least": 1.0, "most": 5.0}
