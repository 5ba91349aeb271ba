"""What the ranks of a profiled run measured, put together: one report for people and machines."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.profiling.communication import COMMUNICATION
from seqtrain.profiling.parts import OTHER, RECOMPUTATION, Part
from seqtrain.report import spread

Values = dict[str, Any]


@dataclass(frozen=True)
class StepWork:
    """What one step has to compute, all ranks together, counted from the config.

    `model_flops`: forward and backward pass, each operator's recurrence as it is defined (MFU). `executed_flops`: what
    the chunked forms multiply, recomputation included (HFU).
    """

    tokens: int
    model_flops: float
    executed_flops: float


def read_profiles(path: Path) -> list[Values]:
    """What `Profiler` wrote: one entry per rank."""
    return json.loads(path.read_text())


def summarize(
    ranks: Sequence[Values], work: StepWork, *, checkpoint_every: int, step_seconds: Sequence[float]
) -> Values:
    """The report: throughput, spread, parts, communication, MFU, memory; seconds and bytes throughout.

    `ranks`: as `read_profiles` gives them. `checkpoint_every`: steps of the original run between two checkpoints.
    `step_seconds`: of the profiled steps, as the run itself timed them.
    Speeds are those of the steps without the profiler, parts those of the steps with it. Times are means over ranks.
    """
    # Of wall time, and of CPU time, which other load on the machine disturbs less.
    plain, profiled, own, own_profiled = (
        _mean_over_ranks(rank[clock][kind] for rank in ranks)
        for clock in ("steps", "processor")
        for kind in ("plain", "profiled")
    )
    parts = _rows(ranks, ("kind", "phase"), profiled)
    peak, step = sum(rank["peak_flops"] for rank in ranks), statistics.median(plain)
    saves = [seconds for rank in ranks for seconds in rank["phases"].get("checkpoint", [])]
    save = statistics.mean(saves) if saves else 0.0
    return {
        "ranks": len(ranks),
        "tokens_per_step": work.tokens,
        "tokens_per_second": spread([work.tokens / seconds for seconds in plain]),
        "step_seconds": {"without_profiler": spread(plain), "with_profiler": spread(profiled)},
        "profiler_overhead": {"time": _overhead(plain, profiled), "processor": _overhead(own, own_profiled)},
        "warm_up_seconds": _mean_over_ranks(rank["steps"].get("warm-up", []) for rank in ranks),
        "parts": parts,
        "layers": _rows(ranks, ("layer", "kind", "phase"), profiled),
        "sum_of_parts": sum(row["seconds"] for row in parts) / statistics.mean(step_seconds),
        "other": sum(row["share"] for row in parts if row["kind"] == OTHER.kind),
        "communication": {
            "exposed_seconds": sum(row["seconds"] for row in parts if row["kind"] == COMMUNICATION),
            "hidden_seconds": statistics.mean(_mean_over_ranks(rank["hidden"] for rank in ranks)),
        },
        "flops": {
            "model": work.model_flops,
            "executed": work.executed_flops,
            "peak_per_second": peak,
            "mfu": work.model_flops / step / peak if peak else None,
            "hfu": work.executed_flops / step / peak if peak else None,
        },
        "checkpoint": {
            "seconds": save,
            "every": checkpoint_every,
            "seconds_per_step": save / checkpoint_every if checkpoint_every else 0.0,
        },
        "memory": [
            {"rank": rank["rank"]} | {name: value for name, value in rank["memory"].items() if name != "samples"}
            for rank in ranks
        ],
    }


def _mean_over_ranks(values: Iterable[list[float]]) -> list[float]:
    """The mean of each step over the ranks, which take every step together."""
    return [statistics.mean(step) for step in zip(*values, strict=True)]


def _overhead(plain: list[float], profiled: list[float]) -> Values:
    """How much longer each step with the profiler took than its neighbor without, as a share of the latter."""
    return spread([b / a - 1 for a, b in zip(plain, profiled, strict=True)])


def _rows(ranks: Sequence[Values], keys: tuple[str, ...], steps: list[float]) -> list[Values]:
    """Seconds of everything alike in `keys`: mean over steps and ranks, quartiles over steps, least and most rank."""
    found: dict[tuple, list[list[float]]] = {}
    for number, rank in enumerate(ranks):
        for part in rank["parts"]:
            sums = found.setdefault(tuple(part[name] for name in keys), [[0.0] * len(steps) for _ in ranks])
            sums[number] = [a + b for a, b in zip(sums[number], part["seconds"], strict=True)]
    rows = []
    for key, by_rank in found.items():
        by_step, means = _mean_over_ranks(by_rank), [statistics.mean(seconds) for seconds in by_rank]
        own, mean = spread(by_step), statistics.mean(by_step)
        figures = {"seconds": mean, "share": mean / statistics.mean(steps), "low": own["low"], "high": own["high"]}
        rows.append(dict(zip(keys, key, strict=True)) | figures | {"least_rank": min(means), "most_rank": max(means)})
    return rows


def by_kind(parts: Sequence[Values]) -> list[Values]:
    """The rows of a table: one per kind of module with its passes, and what else there is.

    What checkpointing recomputes is not a column of the modules but a row of its own.
    """
    rows: dict[str, Values] = {}
    for part in parts:
        again = part["phase"] == RECOMPUTATION
        kind, phase = (RECOMPUTATION, "") if again else (part["kind"], part["phase"])
        name, column = (f"{kind}: {phase}", "") if kind == COMMUNICATION else (kind, phase)
        row = rows.setdefault(name, {"part": name, "forward": 0.0, "backward": 0.0, "seconds": 0.0, "share": 0.0})
        if column:
            row[column] += part["seconds"]
        row["seconds"] += part["seconds"]
        row["share"] += part["share"]
    return list(rows.values())


def trace_events(ranks: Sequence[Values]) -> Values:
    """The last profiled step in Chrome's trace format, which ui.perfetto.dev opens: each rank is a process."""
    events: list[Values] = []
    for rank in ranks:
        process = {"pid": rank["rank"]}
        events.append({"ph": "M", **process, "name": "process_name", "args": {"name": f"rank {rank['rank']}"}})
        for thread, name in enumerate(("training", "messages in flight")):
            events.append({"ph": "M", **process, "tid": thread, "name": "thread_name", "args": {"name": name}})
        in_flight = Part("in flight")
        spans = [(0, span["part"], span["start"], span["seconds"]) for span in rank["spans"]]
        spans += [(1, vars(in_flight), start, end - start) for start, end in rank["in_flight"]]
        for thread, part, start, seconds in spans:
            name = " ".join(word for word in (part["kind"], part["phase"]) if word)
            layer = {"args": {"layer": part["layer"]}} if part["layer"] >= 0 else {}
            times = {"ts": start * 1e6, "dur": seconds * 1e6}
            events.append({"ph": "X", **process, "tid": thread, "name": name} | times | layer)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
