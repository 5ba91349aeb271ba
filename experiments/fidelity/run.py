"""Trains small models on tasks that tell layers apart, and compares each figure with the claim it stands for.

    python tools/run_fidelity.py jobs=2                     # everything on two cores
    python tools/run_fidelity.py rows=[recall] seeds=[0]    # one row

The models are small: a core each for several seeds takes less time than all cores for one. Leaves a table as
`fidelity.json` and `fidelity.md` and a picture of every row in `output_dir`. A claim is judged by the mean over the
seeds. The exit status is 0 whether claims hold or not: the table says it.
"""

import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from experiments.fidelity import ROWS, Effort, Figure, Row, joined
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.report import machine, new_figure, save_figure, write_json

# Of a figure, what follows from its values.
DERIVED = ("mean", "spread", "holds")


@dataclass(frozen=True)
class Settings:
    # Rows of the table; empty: all.
    rows: list[str] = field(default_factory=list)
    # Seeds of weights and training rows; every training is made once for each. Empty: three, or as many as a row needs.
    seeds: list[int] = field(default_factory=list)
    # Multiplies the steps of every training; the claims are made for 1.
    scale: Annotated[float, Field(gt=0)] = 1.0
    # Processes, each of which measures one row with one seed at a time.
    jobs: Annotated[int, Field(gt=0)] = 1
    # CPU threads of each.
    threads: Annotated[int, Field(gt=0)] = 1
    output_dir: str = "outputs/fidelity"


@dataclass(frozen=True)
class Result:
    """A row of the table, measured; the seconds are those of all seeds together."""

    row: Row
    figures: list[Figure]
    seconds: float


def chosen_rows(names: list[str], table: Mapping[str, Row]) -> list[Row]:
    """The rows named, in the table's order. Raises `ConfigError` for a name it doesn't have."""
    for name in names:
        if name not in table:
            raise ConfigError(unknown_name("rows=", name, table))
    return [row for name, row in table.items() if not names or name in names]


def share_that_holds(results: list[Result]) -> str:
    """How many claims hold, of how many, from how many papers: "40 of 46 claims of 19 papers hold"."""
    claims = [figure.holds for result in results for figure in result.figures if figure.bounds]
    papers = {source for result in results for source in result.row.sources}
    return f"{sum(map(bool, claims))} of {len(claims)} claims of {len(papers)} papers hold"


def verdict(figure: Figure) -> str:
    """Whether the claim holds; a figure without bounds is only there to be seen."""
    return {None: "", True: "holds", False: "DOES NOT HOLD"}[figure.holds]


def cells(result: Result, figure: Figure) -> dict[str, str]:
    """One figure as the columns of the table."""
    return {
        "row": result.row.name,
        "what": figure.what,
        "mean ± spread": f"{figure.mean:.4g} ± {figure.spread:.2g}",
        "seeds": " ".join(f"{value:.3g}" for value in figure.values),
        "claim": str(figure.bounds),
        "verdict": verdict(figure),
        "chance": "" if math.isnan(figure.chance) else f"{figure.chance:.3g}",
        "tokens": str(figure.length or ""),
        "steps": f"{min(figure.steps)}-{max(figure.steps)}" if figure.steps else "",
        "s per training": f"{sum(figure.seconds) / len(figure.seconds):.0f}" if figure.seconds else "",
        "parameters": str(figure.parameters or ""),
        "state bytes": str(figure.state_bytes or ""),
    }


def markdown(about: str, results: list[Result]) -> str:
    """The report as text."""
    table = [cells(result, figure) for result in results for figure in result.figures]
    lines = [about, share_that_holds(results), "", "| " + " | ".join(table[0]) + " |", "|" + " --- |" * len(table[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in table]
    for result in results:
        lines += ["", f"**{result.row.name}** ({result.seconds:.0f} s). Claim: {result.row.claim}.", result.row.method]
        if result.row.settings:
            lines.append("Settings: " + ", ".join(f"{name} {value}" for name, value in result.row.settings.items()))
    return "\n".join(lines) + "\n"


def measure(name: str, seed: int, scale: float, threads: int) -> tuple[list[Figure], float]:
    """A row's figures with one seed, and the seconds they took."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    return list(ROWS[name].measure(Effort((seed,), scale))), time.perf_counter() - started


def measure_all(rows: list[Row], settings: Settings) -> Iterator[Result]:
    """The rows in order, but those that are timed last: nothing else runs then."""
    rows = sorted(rows, key=lambda row: row.timed)
    with ProcessPoolExecutor(settings.jobs, mp_context=get_context("spawn")) as pool:
        one = partial(measure, scale=settings.scale, threads=settings.threads)

        def started(row: Row) -> list[Future]:
            return [pool.submit(one, row.name, seed) for seed in settings.seeds or row.seeds]

        found = {row.name: started(row) for row in rows if not row.timed}
        for row in rows:
            parts = [part.result() for part in found.get(row.name) or started(row)]
            figures = [joined(same) for same in zip(*(figures for figures, _ in parts), strict=True)]
            yield Result(row, figures, sum(seconds for _, seconds in parts))


def summary(result: Result) -> str:
    """A row's figures in a few lines."""
    lines = [f"{result.row.name}: {result.row.claim}"]
    for figure in result.figures:
        outcome = ", ".join(part for part in (figure.bounds and f"claim {figure.bounds}", verdict(figure)) if part)
        values = " ".join(f"{value:.4g}" for value in figure.values)
        lines.append(f"  {figure.what}: {figure.mean:.4g} ± {figure.spread:.2g} ({values}) {outcome}")
    return "\n".join(lines)


def draw(result: Result, path: Path) -> None:
    """Left the curves that the figures come from, right the figures with their bounds."""
    canvas = new_figure(13, 4.5)
    left, right = canvas.subplots(1, 2, width_ratios=(3, 2))
    axes = result.row.axes
    for figure in result.figures:
        for curve in figure.curves:
            left.plot(curve.x, curve.y, "-o" if len(curve.x) < 20 else "-", label=curve.label, linewidth=1.2)
    left.set(xlabel=axes.x, ylabel=axes.y, xscale="log" if axes.log_x else "linear")
    left.set_yscale("log" if axes.log_y else "linear")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    for place, figure in enumerate(result.figures):
        color = {None: "tab:gray", True: "tab:blue", False: "tab:red"}[figure.holds]
        right.barh(place, figure.mean, xerr=figure.spread, color=color, alpha=0.6, height=0.6)
        right.plot(figure.values, [place] * len(figure.values), "k.", markersize=4)
        for bound in (figure.bounds.at_least, figure.bounds.at_most):
            if math.isfinite(bound):
                right.plot([bound, bound], [place - 0.45, place + 0.45], "k--", linewidth=1)
    right.set_yticks(range(len(result.figures)), [figure.what for figure in result.figures], fontsize=8)
    right.invert_yaxis()
    right.set_title("mean and seeds; dashed: the claim's bounds; red: does not hold", fontsize=8)
    canvas.suptitle(result.row.claim, fontsize=8, wrap=True)
    save_figure(canvas, path)


def as_json(result: Result) -> dict[str, Any]:
    """A result as plain values; numbers that aren't finite, which JSON can't hold, become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    row = result.row
    settings = {name: str(value) for name, value in row.settings.items()}
    about: dict[str, Any] = {"name": row.name, "claim": row.claim, "method": row.method, "settings": settings}
    about["sources"] = list(row.sources)
    figures = [asdict(each) | {name: getattr(each, name) for name in DERIVED} for each in result.figures]
    return about | {"seconds": result.seconds, "figures": plain(figures)}


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    rows = chosen_rows(settings.rows, ROWS)
    about = machine() | {"processes": settings.jobs, "threads": settings.threads}
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    title += f"; seeds {settings.seeds or 'of each row'}, steps x {settings.scale:g}"
    print(title, flush=True)
    folder = Path(settings.output_dir)
    results: list[Result] = []
    for result in measure_all(rows, settings):
        results.append(result)
        print(summary(result), flush=True)
        draw(result, folder / f"{result.row.name}.png")
        # Rewritten after every row, so that a run that is stopped leaves what it has.
        content = {
            "machine": about,
            "settings": asdict(settings),
            "holds": share_that_holds(results),
            "rows": [as_json(result) for result in results],
        }
        write_json(folder / "fidelity.json", content, allow_nan=False)
        (folder / "fidelity.md").write_text(markdown(title, results))
    print("\n" + markdown(title, results))
    print(share_that_holds(results))
    print(f"{folder / 'fidelity.json'}, fidelity.md, one picture per row")
    return 0
