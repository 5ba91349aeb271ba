"""Pictures of what tools/profile_throughput.py measured."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqtrain.profiling import by_kind
from seqtrain.profiling.memory import PROGRAM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Mapping[str, Any]
PASSES = {"forward": "tab:blue", "backward": "tab:orange", "recomputation": "tab:green"}
MIB = 2**20


def draw_parts(report: Values, path: Path, title: str) -> None:
    """Milliseconds of a step by part, passes side by side in one bar, the longest on top."""
    from matplotlib.figure import Figure

    rows = sorted(by_kind(report["parts"]), key=lambda row: row["seconds"])
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["part"] for row in rows]
    left = [0.0] * len(rows)
    for column in ("forward", "backward"):
        widths = [1e3 * row[column] for row in rows]
        axes.barh(names, widths, left=left, color=PASSES[column], label=column)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    bars = axes.barh(
        names,
        [1e3 * row["seconds"] - done for row, done in zip(rows, left, strict=True)],
        left=left,
        color="tab:gray",
        label="neither",
    )
    axes.bar_label(bars, [f"{1e3 * row['seconds']:.1f} ms, {row['share']:.1%}" for row in rows], padding=4)
    axes.set_xlim(0, 1.3e3 * max(row["seconds"] for row in rows))
    axes.set(xlabel="milliseconds of a step")
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def draw_layers(report: Values, path: Path) -> None:
    """Milliseconds and kept activations of each layer, by kind of module."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    times: dict[str, dict[int, float]] = {}
    for row in report["layers"]:
        if row["layer"] >= 0:
            own = times.setdefault(row["kind"], {})
            own[row["layer"]] = own.get(row["layer"], 0.0) + 1e3 * row["seconds"]
    kept: dict[str, dict[int, float]] = {}
    for row in report["memory"][0]["layers"]:
        if row["layer"] >= 0:
            kept.setdefault(row["kind"], {})[row["layer"]] = row["most_bytes"] / MIB
    colors = {kind: f"C{number % 10}" for number, kind in enumerate(dict.fromkeys([*times, *kept]))}
    _stacks(time_axes, times, colors, "milliseconds of a step, all passes")
    _stacks(memory_axes, kept, colors, "MiB kept for the backward pass, rank 0")
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=120)


def _stacks(axes: "Axes", heights: dict[str, dict[int, float]], colors: dict[str, str], label: str) -> None:
    """A bar a layer, one piece a kind."""
    from matplotlib.ticker import MaxNLocator

    layers = sorted({layer for own in heights.values() for layer in own})
    bottom = dict.fromkeys(layers, 0.0)
    for kind, own in heights.items():
        axes.bar(list(own), list(own.values()), bottom=[bottom[x] for x in own], color=colors[kind], label=kind)
        for layer, height in own.items():
            bottom[layer] += height
    axes.set(xlabel="layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)


def draw_memory(ranks: Sequence[Values], path: Path) -> None:
    """Memory over one step of the first rank, part by part, and what every rank held at its peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    axes, kinds_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    memory = ranks[0]["memory"]
    samples = memory["samples"]
    _shade_passes(axes, [sample["part"]["phase"] for sample in samples])
    edges = range(len(samples) + 1)
    axes.stairs([sample["peak_bytes"] / MIB for sample in samples], edges, baseline=None, label="most held in a part")
    saved = [(sample["saved_bytes"] + memory["resting_bytes"]) / MIB for sample in samples]
    axes.stairs(saved, edges, baseline=None, label="held between steps, and kept for the backward pass")
    highest = max(range(len(samples)), key=lambda index: samples[index]["peak_bytes"])
    axes.plot(
        highest + 0.5, memory["peak_bytes"] / MIB, "v", color="black", label=f"peak: {words(memory['peak_part'])}"
    )
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
    kinds_axes.set(xlabel=f"MiB at the peak, beside {memory['kinds'][PROGRAM] / MIB:.0f} MiB of the program itself")
    kinds_axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _shade_passes(axes: "Axes", phases: Sequence[str]) -> None:
    """A ground in each pass's colour."""
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
    """Throughput with its quartiles, where a step's time goes, and peak memory: a bar a point of the sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.8 + 0.4 * len(labels)), layout="constrained")
    speed, shares, memory = figure.subplots(1, 3, sharey=True, width_ratios=(3, 4, 3))
    found = [report["tokens_per_second"] for report in reports]
    bars = speed.barh(
        labels,
        [own["median"] for own in found],
        xerr=[[o["median"] - o["low"] for o in found], [o["high"] - o["median"] for o in found]],
        color="tab:blue",
    )
    speed.bar_label(bars, [f"{own['median']:,.0f}" for own in found], padding=4)
    speed.margins(x=0.25)
    speed.set(xlabel="tokens a second (bar: quartiles)")
    tables = [{row["part"]: row["share"] for row in by_kind(report["parts"])} for report in reports]
    names = sorted({name for own in tables for name in own}, key=lambda name: -max(t.get(name, 0) for t in tables))
    left = [0.0] * len(labels)
    for number, name in enumerate(names):
        widths = [own.get(name, 0.0) for own in tables]
        hatch = "//" if number >= 10 else None
        shares.barh(labels, widths, left=left, color=f"C{number % 10}", hatch=hatch, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    shares.set(xlabel="share of a step", xlim=(0, 1))
    peaks = [max(rank["peak_bytes"] for rank in report["memory"]) / MIB for report in reports]
    memory.bar_label(memory.barh(labels, peaks, color="tab:gray"), [f"{peak:,.0f}" for peak in peaks], padding=4)
    memory.margins(x=0.25)
    memory.set(xlabel="peak memory of a rank, MiB")
    speed.invert_yaxis()
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
