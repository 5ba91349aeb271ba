"""Measures All-Scan: every schedule, and the patterns other systems use, on the same states over the same ranks.

    python tools/bench_all_scan.py                                   # four ranks of its own, on the loopback interface
    torchrun --nproc-per-node 4 tools/bench_all_scan.py form=[head] state_kib=[16,128,1024] compute_ms=20
    torchrun --nproc-per-node 8 tools/bench_all_scan.py ranks=[2,4,8] form=[dense,channel] state_kib=[16,64,256,1024] \
        only=[auto,pipeline,tree,all_gather,ring] within=3
    torchrun --nproc-per-node 8 tools/bench_all_scan.py layers=8 compute_ms=22    # whole steps, forward and backward

Any launcher will do that starts one copy per rank with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Every round times
each method once, in another order, from a common start to the last rank's end. Rank 0 prints medians and minima with
the cost model's time, and leaves `all_scan.json` and `all_scan.png` in `output_dir`.
"""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch.distributed as dist
from pydantic import Field

from seqtrain.benchmarks.live_table import LiveTable
from seqtrain.benchmarks.ranks import measure_in_turn, on_first_ranks, on_ranks, wire_bytes
from seqtrain.benchmarks.scan_layers import CHAINS, step
from seqtrain.benchmarks.scan_methods import CPU, Contender, Setting, contenders, scan
from seqtrain.benchmarks.scan_pictures import draw_scans, draw_steps
from seqtrain.config import read_settings
from seqtrain.parallel import scans_opened
from seqtrain.parallel.cost import Costs, costs_of
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.report import machine, write_json

WIRE_SCANS = 20
SCAN_TABLE = LiveTable(
    {
        "form": ">7",
        "state KiB": "9.0f",
        "method": "26",
        "bytes, worst": "12,d",
        "median": "9.2f",
        "minimum": "9.2f",
        "/limit": "7.2f",
        "model": "9.2f",
        "/model": "7.2f",
    }
)
STEP_TABLE = LiveTable({"method": "48", "median": "9.1f", "minimum": "9.1f", "/compute": "9.3f", "scans": "6d"})


@dataclass(frozen=True)
class Settings:
    # Sizes of the float32 state, KiB.
    state_kib: Annotated[list[float], Field(min_length=1)] = field(default_factory=lambda: [128.0])
    # Key and value width; the number of heads follows from the size.
    width: Annotated[int, Field(gt=0)] = 64
    # What one factor of the transition belongs to; dense: one matrix per head.
    form: Annotated[list[Literal["none", "head", "channel", "dense"]], Field(min_length=1)] = field(
        default_factory=lambda: ["dense"]
    )
    # Rank counts, each over the first so many ranks; none: all of a launcher's, or 4.
    ranks: list[Annotated[int, Field(gt=1)]] = field(default_factory=list)
    # Above 0: steps of a model of so many layers, forward and backward, instead of single scans.
    layers: Annotated[int, Field(ge=0)] = 0
    # Tokens per rank, for the all-to-all of activations.
    tokens: Annotated[int, Field(gt=0)] = 256
    # Local work per rank, milliseconds; with layers, of a layer in one direction. Slept where a method can compute
    # without the incoming state.
    compute_ms: Annotated[float, Field(ge=0)] = 0.0
    # Rounds that count; two more come before them.
    rounds: Annotated[int, Field(gt=0)] = 15
    # One-way latency of a link in milliseconds, for the limit; 0: as measured.
    latency_ms: Annotated[float, Field(ge=0)] = 0.0
    # Rate of a link in Mbit/s, for the limit; 0: as measured.
    rate_mbit: Annotated[float, Field(ge=0)] = 0.0
    # Methods whose names start so; none: all.
    only: list[str] = field(default_factory=list)
    # Schedules that the cost model puts at more than so many times its cheapest are left out; 0: none is.
    within: Annotated[float, Field(ge=0)] = 0.0
    # Folder for the results.
    output_dir: str = "outputs/bench_all_scan"


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, bytes those the busiest rank receives."""

    ranks: int
    state_kib: float
    form: str
    method: str
    payload_bytes: int
    median_ms: float
    minimum_ms: float
    model_ms: float | None
    limit_ratio: float


@dataclass(frozen=True)
class Step:
    """One line of the table of whole steps; `scans`: how many scans a rank took part in, in one step."""

    ranks: int
    method: str
    median_ms: float
    minimum_ms: float
    compute_ms: float
    ratio: float
    scans: int


def chosen(settings: Settings, found: Mapping[str, Contender]) -> dict[str, Contender]:
    """Those the settings ask for; `auto` and what has no model always pass `within`."""
    cheapest = min(c.expected for c in found.values() if c.expected is not None)
    limit = settings.within * cheapest if settings.within else math.inf
    return {
        name: c
        for name, c in found.items()
        if (not settings.only or any(name.startswith(wanted) for wanted in settings.only))
        and (c.expected is None or c.expected <= limit or name.startswith("auto"))
    }


def settings_of(settings: Settings, group: dist.ProcessGroup) -> Iterator[tuple[str, float, Setting]]:
    """Every form and size of state, with this rank's inputs."""
    for form, kib in itertools.product(settings.form, settings.state_kib):
        compute = settings.compute_ms / 1e3
        yield form, kib, Setting.random(group, form, kib, settings.width, tokens=settings.tokens, compute=compute)


def measure_scans(settings: Settings, group: dist.ProcessGroup) -> list[Row]:
    """All methods, sizes and forms over one group."""
    costs = group_costs(group)
    if group.rank() == 0:
        print(f"{group.size()} ranks, {settings.compute_ms:g} ms of local work; {costs}\n{SCAN_TABLE.header}")
    return [row for point in settings_of(settings, group) for row in measure_state(settings, costs, *point)]


def group_costs(group: dist.ProcessGroup) -> Costs:
    """What scans cost on this group; the first time all its ranks measure."""
    return costs_of(engine_of(group.group_name), CPU)


def measure_state(settings: Settings, costs: Costs, form: str, kib: float, setting: Setting) -> list[Row]:
    """All methods for one size and form of state."""
    group = setting.group
    limit = physical_limit(settings, costs, group.size(), setting.update.nbytes)
    found = chosen(settings, contenders(setting))
    times = measure_in_turn(group, {name: partial(c.method, setting) for name, c in found.items()}, settings.rounds)
    rows = []
    for name, contender in found.items():
        median, low = statistics.median(times[name]), min(times[name])
        model_ms = None if contender.expected is None else 1e3 * contender.expected
        ratio = median / max(limit, 1e-9)
        rows.append(Row(group.size(), kib, form, name, contender.payload, 1e3 * median, 1e3 * low, model_ms, ratio))
    traffic = wire_bytes(group, partial(scan_often, setting))
    if group.rank() == 0:
        print("\n".join(row_line(row) for row in rows))
        print_choice(rows)
        if traffic is not None:
            received, sent = (figure / WIRE_SCANS / setting.update.nbytes for figure in traffic)
            print(f"  wire, a pipelined scan: {received:.3f} states received, {sent:.3f} sent by the busiest rank")
    return rows


def scan_often(setting: Setting) -> None:
    for _ in range(WIRE_SCANS):
        scan(setting, "pipeline", None)()


def physical_limit(settings: Settings, costs: Costs, ranks: int, state_bytes: int) -> float:
    """Seconds no scan can beat: the latency of every link, and one state on one link; or the local work if longer."""
    latency = settings.latency_ms / 1e3 or costs.latency
    byte = 8e-6 / settings.rate_mbit if settings.rate_mbit else costs.byte
    return max((ranks - 1) * latency + state_bytes * byte, settings.compute_ms / 1e3)


def row_line(row: Row) -> str:
    times = (row.median_ms, row.minimum_ms, row.limit_ratio, row.model_ms)
    ratio = None if row.model_ms is None else row.median_ms / row.model_ms
    return SCAN_TABLE.row(row.form, row.state_kib, row.method, row.payload_bytes, *times, ratio)


def print_choice(rows: list[Row]) -> None:
    """How far `auto` is from the best of the fixed choices, by medians and by minima."""
    auto = [row for row in rows if row.method.startswith("auto")]
    fixed = [row for row in rows if row.model_ms is not None and not row.method.startswith("auto")]
    if not auto or not fixed:
        return
    best = min(fixed, key=lambda row: row.median_ms)
    by_median = auto[0].median_ms / best.median_ms
    by_minimum = auto[0].minimum_ms / min(row.minimum_ms for row in fixed)
    print(f"  {auto[0].method}: {by_median:.3f} of the best fixed choice, {best.method}; {by_minimum:.3f} by minima")


def measure_steps(settings: Settings, group: dist.ProcessGroup) -> list[Step]:
    """Whole steps over one group: every chain, and the bytes `auto` puts on the wire."""
    return [
        row
        for form, kib, setting in settings_of(settings, group)
        for row in measure_chains(settings, setting, f"{form}, {kib:g} KiB: ")
    ]


def measure_chains(settings: Settings, setting: Setting, label: str) -> list[Step]:
    group, layers = setting.group, settings.layers
    alone = "compute alone"
    names = [n for n in CHAINS if not settings.only or n == alone or any(n.startswith(o) for o in settings.only)]
    group_costs(group)
    runs: dict[str, Callable] = {name: partial(step, setting, layers, CHAINS[name]) for name in names}
    scans = {}
    for name, run in runs.items():
        before = scans_opened(group)
        run()()
        scans[name] = scans_opened(group) - before
    times = measure_in_turn(group, runs, settings.rounds)
    compute = 1e3 * statistics.median(times[alone])
    rows = []
    for name in names:
        median = 1e3 * statistics.median(times[name])
        low = 1e3 * min(times[name])
        rows.append(Step(group.size(), label + name, median, low, compute, median / compute, scans[name]))
    traffic = wire_bytes(group, lambda: [runs["auto"]()() for _ in range(WIRE_SCANS)]) if "auto" in runs else None
    if group.rank() == 0:
        print(f"{group.size()} ranks, {layers} layers of {settings.compute_ms:g} ms forward, as many backward")
        print(STEP_TABLE.header)
        for row in rows:
            print(STEP_TABLE.row(row.method, row.median_ms, row.minimum_ms, row.ratio, row.scans))
        if traffic is not None:
            # A rank in the middle receives a state forward and one backward; the first and the last half of that.
            directions = 1 if group.size() == 2 else 2
            whole = WIRE_SCANS * layers * directions * setting.update.nbytes
            received, sent = (figure / whole for figure in traffic)
            print(
                f"  wire, auto: {received:.3f} states received, {sent:.3f} sent per layer and direction, busiest rank"
            )
    return rows


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    counts = settings.ranks or [int(os.environ.get("WORLD_SIZE", "4"))]
    outcome = on_ranks(max(counts), measure_all, settings, counts)
    if outcome is None:
        return 0
    rows, costs = outcome
    report, picture = (Path(settings.output_dir) / f"all_scan.{kind}" for kind in ("json", "png"))
    head = {"machine": machine(), "settings": asdict(settings), "costs": costs}
    write_json(report, {**head, "rows": [asdict(row) for row in rows]})
    if settings.layers:
        draw_steps(rows, picture, f"{settings.layers} layers of {settings.compute_ms:g} ms")
    else:
        draw_scans(rows, picture)
    print(f"{report}, {picture}")
    return 0


def measure_all(
    group: dist.ProcessGroup, settings: Settings, counts: list[int]
) -> tuple[list[Row] | list[Step], dict[int, dict[str, float]]]:
    """What was measured over the first P ranks for every P of `counts`, and the costs each choice rested on."""
    costs: dict[int, dict[str, float]] = {}

    def measured(part: dist.ProcessGroup) -> list:
        rows = measure_steps(settings, part) if settings.layers else measure_scans(settings, part)
        costs[part.size()] = asdict(group_costs(part))
        return rows

    return on_first_ranks(group, counts, measured), costs
