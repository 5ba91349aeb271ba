"""Scans of this tree beside those of another commit: turn by turn on one machine, and message by message."""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from seqtrain.benchmarks import scan_side
from seqtrain.benchmarks.commits import ROOT, checkout
from seqtrain.benchmarks.ranks import WARM_UP
from seqtrain.benchmarks.scan_side import Deed, Request
from seqtrain.parallel.cost import Costs
from seqtrain.report import LiveTable, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THERE, HERE = "there", "here"
Run = Callable[[Request], dict[str, Any]]
Limit = Callable[[Costs, int, int], float]
Row = dict[str, Any]
TABLE = LiveTable(
    {
        "ranks": "5d",
        "form": ">7",
        "state KiB": "9.0f",
        "there, median": "13.2f",
        "quartiles": ">15",
        "minimum": "9.2f",
        "here, median": "12.2f",
        "quartiles ": ">15",
        "minimum ": "9.2f",
        "limit": "8.2f",
        "/limit": "6.2f",
        "there/here": "10.2f",
    }
)
COLORS = {"receive": "lightgray", "apply": "tab:green", "send": "tab:blue", "start": "tab:purple", "result": "white"}


@contextmanager
def side_of(tree: Path, counts: list[int], namespace: str, priority: int) -> Iterator[Run]:
    """Runs requests with the code in `tree`, on ranks of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # `-P`: the program's own folder's modules are not to be found by their bare names.
        words = json.dumps([f"{folder}/store", counts, namespace, priority])
        command = [sys.executable, "-P", str(scan_side.__file__), words]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with subprocess.Popen(command, cwd=tree, env=environment, **pipes) as process:
            requests, answers = process.stdin, process.stdout
            assert requests is not None
            assert answers is not None

            def run(request: Request) -> dict[str, Any]:
                with suppress(BrokenPipeError):
                    requests.write(json.dumps(request) + "\n")
                    requests.flush()
                answer = answers.readline()
                if not answer:
                    raise RuntimeError(f"the ranks with the code in {tree} have ended: see their output above")
                found: dict[str, Any] = json.loads(answer)
                return found

            try:
                yield run
            finally:
                requests.close()


def compare(settings: Any, counts: list[int], limit: Limit) -> tuple[list[Row], dict[str, list[list[Deed]]]]:
    """Medians, quartiles and minima of both sides, and what each rank did in one traced run of the last setting.

    `limit`: seconds no scan can beat, from measured costs, the number of ranks and the bytes of a state.
    """
    rows: list[Row] = []
    print(TABLE.header)
    how = counts, settings.namespace, settings.priority
    with checkout(settings.against) as tree, side_of(tree, *how) as there, side_of(ROOT, *how) as here:
        sides: dict[str, Run] = {THERE: there, HERE: here}
        for count, form, kib in itertools.product(counts, settings.form, settings.state_kib):
            request = {"ranks": count, "form": form, "kib": kib, "width": settings.width, "layers": settings.layers}
            request |= {"compute": settings.compute_ms / 1e3, "traced": False}
            times, costs = in_turn(sides, request, settings.rounds)
            whole = 2 * settings.layers * settings.compute_ms / 1e3
            rows.append(_row(request, times, whole or limit(costs, count, round(1024 * kib))))
            _print(rows[-1])
        names = {THERE: settings.against, HERE: HERE}
        return rows, {names[side]: _typical(run, request, rows[-1][side]) for side, run in sides.items()}


def in_turn(sides: dict[str, Run], request: Request, rounds: int) -> tuple[dict[str, list[float]], Costs]:
    """Seconds of every side, `rounds` of each in turn; and what scans cost here."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = random.Random(0)
    for _ in range(WARM_UP + rounds):
        for name in order.sample(list(sides), len(sides)):
            answer = sides[name](request)
            times[name].append(answer["seconds"])
            if name == HERE:
                costs = Costs(**answer["costs"])
    return {name: taken[WARM_UP:] for name, taken in times.items()}, costs


def _typical(run: Run, request: Request, times: Mapping[str, float]) -> list[list[Deed]]:
    """What each rank did in the run, of a few that are traced, whose time is nearest to the median."""
    tries = [run({**request, "traced": True}) for _ in range(5)]
    deeds: list[list[Deed]] = min(tries, key=lambda each: abs(1e3 * each["seconds"] - times["median_ms"]))["deeds"]
    return deeds


def _row(request: Request, times: dict[str, list[float]], limit: float) -> Row:
    row: Row = {"ranks": request["ranks"], "form": request["form"], "state_kib": request["kib"]}
    for name, taken in times.items():
        ms = [1e3 * each for each in taken]
        first, _, third = quantiles(ms, n=4) if len(ms) > 1 else ms * 3
        row[name] = {
            "median_ms": median(ms), "minimum_ms": min(ms), "first_quartile_ms": first, "third_quartile_ms": third
        }  # fmt: skip
    return row | {"limit_ms": 1e3 * limit}


def _print(row: Row) -> None:
    cells = []
    for of in (row[THERE], row[HERE]):
        spread = f"{of['first_quartile_ms']:.2f}-{of['third_quartile_ms']:.2f}"
        cells += [of["median_ms"], spread, of["minimum_ms"]]
    here, there = (row[name]["median_ms"] for name in (HERE, THERE))
    numbers = (row["limit_ms"], here / max(row["limit_ms"], 1e-9), there / here)
    print(TABLE.row(row["ranks"], row["form"], row["state_kib"], *cells, *numbers))


def told(deeds: Sequence[Sequence[Deed]]) -> str:
    """Every message of a traced run, and what each rank spent its time with: a text, in milliseconds."""
    begun = min(deed[3] for own in deeds for deed in own)
    lines = ["rank what    with    bytes     begin       end"]
    for rank, own in enumerate(deeds):
        for what, peer, size, begin, end in sorted(own, key=lambda deed: deed[3]):
            other = f"{peer:4}" if peer >= 0 else "    "
            lines.append(f"{rank:4} {what:7} {other} {size:8} {1e3 * (begin - begun):9.3f} {1e3 * (end - begun):9.3f}")
    lines.append("")
    for rank, own in enumerate(deeds):
        sums = {what: sum(1e3 * (d[4] - d[3]) for d in own if d[0] == what) for what in ("receive", "apply", "send")}
        counts = {what: sum(d[0] == what for d in own) for what in sums}
        said = ", ".join(f"{what} {counts[what]} in {ms:.2f}" for what, ms in sums.items())
        lines.append(f"rank {rank}: {said}; ends at {1e3 * (max(d[4] for d in own) - begun):.2f}")
    return "\n".join(lines) + "\n"


def draw(deeds: dict[str, list[list[Deed]]], folder: Path) -> Path:
    """A picture of the traced run of each side, on one scale: a lane a rank, and a line a message."""
    figure = new_figure(14, 1.5 + 0.55 * sum(len(ranks) for ranks in deeds.values()))
    panels = figure.subplots(len(deeds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, ranks) in zip(panels, deeds.items(), strict=True):
        _lanes(axes, ranks)
        axes.set_title(f"{name}: green a map is applied, blue a message is sent, gray it is waited for")
    panels[-1].set_xlabel("ms")
    path = folder / "all_scan_timeline.png"
    save_figure(figure, path)
    return path


def _lanes(axes: "Axes", ranks: list[list[Deed]]) -> None:
    begun = min(deed[3] for own in ranks for deed in own)
    left: dict[tuple[int, int], list[float]] = {}
    for rank, own in enumerate(ranks):
        for what, peer, _, begin, _ in sorted(own, key=lambda deed: deed[3]):
            if what == "send":
                left.setdefault((rank, peer), []).append(1e3 * (begin - begun))
    for rank, own in enumerate(ranks):
        came: dict[int, int] = {}
        for what, peer, _, begin, end in sorted(own, key=lambda deed: deed[3]):
            if what == "result":
                continue
            first, width = 1e3 * (begin - begun), max(1e3 * (end - begin), 0.02)
            axes.barh(rank, width, 0.6, first, color=COLORS[what], zorder=1 if what == "receive" else 2)
            if what == "receive" and came.setdefault(peer, 0) < len(left.get((peer, rank), [])):
                sent = left[peer, rank][came[peer]]
                came[peer] += 1
                axes.plot([sent, 1e3 * (end - begun)], [peer, rank], color="tab:red", linewidth=0.5, zorder=3)
    axes.set_ylabel("rank")
    axes.set_yticks(range(len(ranks)))
    axes.invert_yaxis()
