"""Measures All-Scan: every schedule, and the patterns other systems use, on the same states over the same ranks.

    python tools/bench_all_scan.py                                   # four ranks of its own, on the loopback interface
    torchrun --nproc-per-node 4 tools/bench_all_scan.py form=[head] state_kib=[16,128,1024] compute_ms=20
    torchrun --nproc-per-node 8 tools/bench_all_scan.py ranks=[2,4,8] form=[dense,channel] state_kib=[16,64,256,1024] \
        only=[auto,pipeline,tree,all_gather,ring] within=3
    torchrun --nproc-per-node 8 tools/bench_all_scan.py layers=8 compute_ms=22    # whole steps, forward and backward
    python tools/bench_all_scan.py against=92755d4 ranks=[2,4,8] state_kib=[2,128,2048]
    python tools/bench_all_scan.py against=92755d4 ranks=[8] namespace=lab priority=5 latency_ms=1 rate_mbit=100

Any launcher will do that starts one copy per rank with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Every round times
each method once, in another order, from a common start to the last rank's end. Rank 0 prints medians and minima with
the cost model's time, and leaves `all_scan.json` and `all_scan.png` in `output_dir`.

With `against` a commit's scans are measured beside this tree's, on ranks of both on this machine that take turns, and
every message of one run of each is told in `all_scan_timeline.txt` and drawn in `all_scan_timeline.png`.
"""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch.distributed as dist
from pydantic import Field

from seqtrain.benchmarks.ranks import measure_in_turn, on_first_ranks, on_ranks, wire_bytes
from seqtrain.benchmarks.scan_against import compare, told
from seqtrain.benchmarks.scan_against import draw as draw_timeline
from seqtrain.benchmarks.scan_methods import CHAINS, Setting, contenders, group_costs, scan, step
from seqtrain.config import read_settings
from seqtrain.parallel import scans_opened
from seqtrain.parallel.cost import Costs
from seqtrain.report import LiveTable, new_figure, save_figure, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One line of a table, as the JSON has it: times in milliseconds, `payload_bytes` those the busiest rank receives, of
# whole steps `scans` in which a rank took part.
Row = dict[str, Any]
WIRE_SCANS = 20
# Beyond this many panels of scans only the first ones are drawn.
PANELS = 6
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
    # A commit whose scans are measured beside this tree's, both with `auto`; empty: all methods of this tree.
    against: str = ""
    # With `against`: real-time priority of all ranks, where other programs would disturb them (as root); 0: none.
    priority: Annotated[int, Field(ge=0, lt=100)] = 0
    # With `against`: rank r lives in the network namespace of this name and r, a host of a lab (as root); empty: none.
    namespace: str = ""
    # Methods whose names start so; none: all.
    only: list[str] = field(default_factory=list)
    # Schedules that the cost model puts at more than so many times its cheapest are left out; 0: none is.
    within: Annotated[float, Field(ge=0)] = 0.0
    # Folder for the results.
    output_dir: str = "outputs/bench_all_scan"


def measure_all(
    group: dist.ProcessGroup, settings: Settings, counts: list[int]
) -> tuple[list[Row], dict[int, dict[str, float]]]:
    """What was measured over the first P ranks for every P of `counts`, and the costs each choice rested on."""
    costs: dict[int, dict[str, float]] = {}

    def measured(part: dist.ProcessGroup) -> list[Row]:
        found = group_costs(part)
        costs[part.size()] = asdict(found)
        if part.rank() == 0 and not settings.layers:
            print(f"{part.size()} ranks, {settings.compute_ms:g} ms of local work; {found}\n{SCAN_TABLE.header}")
        rows = []
        for form, kib in itertools.product(settings.form, settings.state_kib):
            compute = settings.compute_ms / 1e3
            setting = Setting.random(part, form, kib, settings.width, tokens=settings.tokens, compute=compute)
            rows += (
                measure_steps(settings, setting, f"{form}, {kib:g} KiB: ")
                if settings.layers
                else measure_scans(settings, setting, found, form, kib)
            )
        return rows

    return on_first_ranks(group, counts, measured), costs


def measure_scans(settings: Settings, setting: Setting, costs: Costs, form: str, kib: float) -> list[Row]:
    """All methods that the settings ask for, on one size and form of state."""
    group, limit = setting.group, physical_limit(settings, costs, setting.group.size(), setting.update.nbytes)
    found = contenders(setting)
    cheapest = min(c.expected for c in found.values() if c.expected is not None)
    dearest = settings.within * cheapest if settings.within else math.inf
    found = {
        name: c
        for name, c in found.items()
        if (not settings.only or name.startswith(tuple(settings.only)))
        # `auto` and what has no model always pass.
        and (c.expected is None or c.expected <= dearest or name.startswith("auto"))
    }
    times = measure_in_turn(group, {name: partial(c.method, setting) for name, c in found.items()}, settings.rounds)
    rows: list[Row] = [
        {
            "ranks": group.size(),
            "state_kib": kib,
            "form": form,
            "method": name,
            "payload_bytes": contender.payload,
            "median_ms": 1e3 * median(times[name]),
            "minimum_ms": 1e3 * min(times[name]),
            "model_ms": None if contender.expected is None else 1e3 * contender.expected,
            "limit_ratio": median(times[name]) / max(limit, 1e-9),
        }
        for name, contender in found.items()
    ]
    traffic = wire_bytes(group, lambda: [scan(setting, "pipeline")() for _ in range(WIRE_SCANS)])
    if group.rank() == 0:
        print_scans(rows)
        print_wire(traffic, ", a pipelined scan", "by the busiest rank", WIRE_SCANS * setting.update.nbytes)
    return rows


def physical_limit(settings: Settings, costs: Costs, ranks: int, size: int) -> float:
    """Seconds no scan can beat: the latency of every link, and one state of `size` bytes on one link; or the local work
    if longer.
    """
    latency = settings.latency_ms / 1e3 or costs.latency
    byte = 8e-6 / settings.rate_mbit if settings.rate_mbit else costs.byte
    return max((ranks - 1) * latency + size * byte, settings.compute_ms / 1e3)


def print_scans(rows: list[Row]) -> None:
    """The lines, and how far `auto` is from the best of the fixed choices, by medians and by minima."""
    for row in rows:
        names = ("form", "state_kib", "method", "payload_bytes", "median_ms", "minimum_ms", "limit_ratio", "model_ms")
        ratio = None if row["model_ms"] is None else row["median_ms"] / row["model_ms"]
        print(SCAN_TABLE.row(*(row[name] for name in names), ratio))
    auto = [row for row in rows if row["method"].startswith("auto")]
    fixed = [row for row in rows if row["model_ms"] is not None and not row["method"].startswith("auto")]
    if auto and fixed:
        best = min(fixed, key=lambda row: row["median_ms"])
        by_median = auto[0]["median_ms"] / best["median_ms"]
        by_minimum = auto[0]["minimum_ms"] / min(row["minimum_ms"] for row in fixed)
        said = f"{by_median:.3f} of the best fixed choice, {best['method']}; {by_minimum:.3f} by minima"
        print(f"  {auto[0]['method']}: {said}")


def print_wire(traffic: tuple[float, float] | None, what: str, whose: str, size: float) -> None:
    """Bytes received and sent, in states; `size`: of all states that had to travel."""
    if traffic is not None:
        received, sent = (figure / size for figure in traffic)
        print(f"  wire{what}: {received:.3f} states received, {sent:.3f} sent {whose}")


def measure_steps(settings: Settings, setting: Setting, label: str) -> list[Row]:
    """Whole steps of every chain, and the bytes `auto` puts on the wire."""
    group, layers, alone = setting.group, settings.layers, "compute alone"
    names = [name for name in CHAINS if not settings.only or name == alone or name.startswith(tuple(settings.only))]
    runs: dict[str, Callable] = {name: partial(step, setting, layers, CHAINS[name]) for name in names}
    scans = {}
    for name, run in runs.items():
        before = scans_opened(group)
        run()()
        scans[name] = scans_opened(group) - before
    times = {name: [1e3 * each for each in own] for name, own in measure_in_turn(group, runs, settings.rounds).items()}
    rows: list[Row] = [
        {
            "ranks": group.size(),
            "method": label + name,
            "median_ms": median(times[name]),
            "minimum_ms": min(times[name]),
            "compute_ms": median(times[alone]),
            "ratio": median(times[name]) / median(times[alone]),
            "scans": scans[name],
        }
        for name in names
    ]
    traffic = wire_bytes(group, lambda: [runs["auto"]()() for _ in range(WIRE_SCANS)]) if "auto" in runs else None
    if group.rank() == 0:
        print(f"{group.size()} ranks, {layers} layers of {settings.compute_ms:g} ms forward, as many backward")
        print(STEP_TABLE.header)
        for row in rows:
            print(STEP_TABLE.row(*(row[key] for key in ("method", "median_ms", "minimum_ms", "ratio", "scans"))))
        # A rank in the middle receives a state forward and one backward; the first and the last half of that.
        size = WIRE_SCANS * layers * (1 if group.size() == 2 else 2) * setting.update.nbytes
        print_wire(traffic, ", auto", "per layer and direction, busiest rank", size)
    return rows


def draw(rows: list[Row], path: Path, steps: str) -> None:
    """Median time of every method, one panel per rank count and form: bars for one size, lines over several sizes.

    `steps`: what whole steps are of, where the rows are those.
    """
    panels: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["ranks"], row.get("form", "")), []).append(row)
    shown = list(panels.items())[: None if steps else PANELS]
    across = 1 if steps or len(shown) == 1 else 2
    down = -(-len(shown) // across)
    figure = new_figure(8 * across, (3.5 if steps else 5) * down)
    for axes, ((ranks, form), own) in zip(figure.subplots(down, across, squeeze=False).flat, shown, strict=False):
        first = own[0]
        if steps:
            axes.set_title(f"{steps}, {ranks} ranks")
            _bars(axes, own, first["compute_ms"], "median time of a step, ms")
            continue
        axes.set_title(f"All-Scan, {ranks} ranks, {form} transition")
        if len({row["state_kib"] for row in own}) == 1:
            limit = first["median_ms"] / first["limit_ratio"]
            _bars(axes, own, limit, f"median time of a scan of {first['state_kib']:g} KiB, ms")
        else:
            _lines(axes, own)
    save_figure(figure, path)


def _bars(axes: "Axes", rows: list[Row], limit: float, title: str) -> None:
    medians = {row["method"]: row["median_ms"] for row in rows}
    colors = ["tab:orange" if "their" in name else "tab:blue" for name in medians]
    axes.bar_label(axes.barh(list(medians), list(medians.values()), color=colors), fmt="%.1f", padding=3)
    axes.axvline(limit, color="black", label="limit")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(title)
    axes.legend()


def _lines(axes: "Axes", rows: list[Row]) -> None:
    """One line per method over the size of the state; the limit of the links is each point over its ratio."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(row["method"].split(" = ")[0], []).append(row)
    for name, own in curves.items():
        style = "-" if name == "auto" else "--" if name.startswith("their") else ":"
        points = [row["state_kib"] for row in own], [row["median_ms"] for row in own]
        axes.plot(*points, style, marker="o", linewidth=3 if name == "auto" else 1, label=name)
    limits = {row["state_kib"]: row["median_ms"] / row["limit_ratio"] for row in rows}
    axes.plot(list(limits), list(limits.values()), "k-", marker="_", label="limit of the links")
    axes.set(xscale="log", yscale="log", xlabel="state, KiB", ylabel="median time of a scan, ms")
    axes.legend(fontsize=7, ncols=2)


def main_against(settings: Settings, counts: list[int]) -> int:
    rows, deeds = compare(settings, counts, partial(physical_limit, settings))
    folder = Path(settings.output_dir)
    report, text = folder / "all_scan_against.json", folder / "all_scan_timeline.txt"
    write_results(report, settings, rows=rows)
    text.write_text("\n".join(f"{name}\n{told(ranks)}" for name, ranks in deeds.items()))
    print(f"{report}, {text}, {draw_timeline(deeds, folder)}")
    return 0


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    counts = settings.ranks or [int(os.environ.get("WORLD_SIZE", "4"))]
    if settings.against:
        return main_against(settings, counts)
    outcome = on_ranks(max(counts), measure_all, settings, counts)
    if outcome is not None:
        rows, costs = outcome
        report, picture = (Path(settings.output_dir) / f"all_scan.{kind}" for kind in ("json", "png"))
        write_results(report, settings, costs=costs, rows=rows)
        draw(rows, picture, f"{settings.layers} layers of {settings.compute_ms:g} ms" if settings.layers else "")
        print(f"{report}, {picture}")
    return 0
