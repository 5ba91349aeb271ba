"""Pictures of a profile: parts, layers and memory of a step, and the points of a sweep."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqtrain.profiling.memory import PROGRAM
from seqtrain.profiling.report import by_kind
from seqtrain.report import new_figure, save_figure, stacked_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Mapping[str, Any]
PASSES = {"forward": "tab:blue", "backward": "tab:orange", "recomputation": "tab:green"}
MIB = 2**20


def draw_parts(report: Values, path: Path, title: str) -> None:
    """Milliseconds of a step by part, its passes in one bar, the longest on top."""
    rows = sorted(by_kind(report["parts"]), key=lambda row: row["seconds"])
    figure = new_figure(9, 1.5 + 0.35 * len(rows))
    axes = figure.subplots()
    pieces = [{name: row[name] for name in ("forward", "backward")} for row in rows]
    for row, passes in zip(rows, pieces, strict=True):
        passes["neither"] = row["seconds"] - row["forward"] - row["backward"]
    stacked_bars(axes, [row["part"] for row in rows], pieces, scale=1e3, colors=PASSES | {"neither": "tab:gray"})
    texts = [f"{1e3 * row['seconds']:.1f} ms, {row['share']:.1%}" for row in rows]
    axes.bar_label(axes.containers[-1], texts, padding=4)  # type: ignore[arg-type]
    axes.set(xlabel="milliseconds of a step", xlim=(0, 1.3e3 * max(row["seconds"] for row in rows)))
    axes.legend(loc="lower right")
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10)
    save_figure(figure, path)


def draw_layers(report: Values, path: Path) -> None:
    """Milliseconds and kept activations of each layer, by kind of module."""
    figure = new_figure(11, 4.5)
    time_axes, memory_axes = figure.subplots(1, 2)
    times = _by_layer(report["layers"], "seconds")
    kept = _by_layer(report["memory"][0]["layers"], "most_bytes")
    kinds = dict.fromkeys(kind for table in (times, kept) for layer in table.values() for kind in layer)
    colors = {kind: f"C{number % 10}" for number, kind in enumerate(kinds)}
    for axes, table, scale, label in (
        (time_axes, times, 1e3, "milliseconds of a step, all passes"),
        (memory_axes, kept, 1 / MIB, "MiB kept for the backward pass, rank 0"),
    ):
        stacked_bars(axes, list(table), list(table.values()), scale=scale, colors=colors, upright=True)
        axes.set(xlabel="layer", ylabel=label)
        axes.locator_params(axis="x", integer=True)
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    save_figure(figure, path)


def _by_layer(rows: Sequence[Values], column: str) -> dict[int, dict[str, float]]:
    """The sum of `column` by layer and kind."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["layer"] >= 0:
            own = found.setdefault(row["layer"], {})
            own[row["kind"]] = own.get(row["kind"], 0.0) + row[column]
    return found


def draw_memory(ranks: Sequence[Values], path: Path) -> None:
    """Memory over one step of the first rank, part by part, and what every rank held at its peak."""
    figure = new_figure(13, 4.8)
    axes, kinds_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    memory = ranks[0]["memory"]
    samples = memory["samples"]
    _shade_passes(axes, [sample["part"]["phase"] for sample in samples])
    edges = range(len(samples) + 1)
    axes.stairs([sample["peak_bytes"] / MIB for sample in samples], edges, baseline=None, label="peak within a part")
    saved = [(sample["saved_bytes"] + memory["resting_bytes"]) / MIB for sample in samples]
    axes.stairs(saved, edges, baseline=None, label="held between steps, and kept for the backward pass")
    highest = max(range(len(samples)), key=lambda index: samples[index]["peak_bytes"])
    label = f"peak: {words(memory['peak_part'])}"
    axes.plot(highest + 0.5, memory["peak_bytes"] / MIB, "v", color="black", label=label)
    axes.set(xlabel="parts of the step, in order", ylabel="MiB, rank 0")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    height = 0.8 / len(ranks)
    for number, rank in enumerate(ranks):
        # The program is in all of them, and would hide what a model adds.
        kinds = {kind: size / MIB for kind, size in rank["memory"]["kinds"].items() if kind != PROGRAM}
        places = [index + number * height for index in range(len(kinds))]
        bars = kinds_axes.barh(places, list(kinds.values()), height, label=f"rank {rank['rank']}")
        kinds_axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    kinds_axes.set_yticks([index + 0.4 - height / 2 for index in range(len(kinds))], list(kinds))
    kinds_axes.invert_yaxis()
    kinds_axes.margins(x=0.15)
    kinds_axes.set(xlabel=f"MiB at the peak, without the program's {memory['kinds'][PROGRAM] / MIB:.0f} MiB")
    kinds_axes.legend(fontsize=8)
    save_figure(figure, path)


def _shade_passes(axes: "Axes", phases: Sequence[str]) -> None:
    """A background in each pass's color."""
    place = 0
    for phase, own in groupby(phases):
        length = len(list(own))
        if phase in PASSES:
            axes.axvspan(place, place + length, color=PASSES[phase], alpha=0.12, linewidth=0)
        place += length
    for phase in PASSES:
        if phase in phases:
            axes.fill_between([], [], color=PASSES[phase], alpha=0.12, label=phase)


def words(part: Values) -> str:
    """A part's name: kind, pass, layer."""
    layer = f"layer {part['layer']}" if part["layer"] >= 0 else ""
    return " ".join(word for word in (part["kind"], part["phase"], layer) if word)


def draw_sweep(labels: Sequence[str], reports: Sequence[Values], path: Path) -> None:
    """Throughput with its quartiles, where a step's time goes, and peak memory: one bar per point of the sweep."""
    figure = new_figure(13, 1.8 + 0.4 * len(labels))
    speed, shares, memory = figure.subplots(1, 3, sharey=True, width_ratios=(3, 4, 3))
    found = [report["tokens_per_second"] for report in reports]
    medians = [own["median"] for own in found]
    errors = [[o["median"] - o["low"] for o in found], [o["high"] - o["median"] for o in found]]
    speed.bar_label(speed.barh(labels, medians, xerr=errors), [f"{median:,.0f}" for median in medians], padding=4)
    speed.set(xlabel="tokens per second (bar: quartiles)")
    stacked_bars(shares, labels, [{r["part"]: r["share"] for r in by_kind(report["parts"])} for report in reports])
    shares.set(xlabel="share of a step", xlim=(0, 1))
    peaks = [max(rank["peak_bytes"] for rank in report["memory"]) / MIB for report in reports]
    memory.bar_label(memory.barh(labels, peaks, color="tab:gray"), [f"{peak:,.0f}" for peak in peaks], padding=4)
    memory.set(xlabel="peak memory of a rank, MiB")
    for axes in (speed, memory):
        axes.margins(x=0.25)
    speed.invert_yaxis()
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save_figure(figure, path)
