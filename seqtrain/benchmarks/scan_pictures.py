"""Pictures of scans and steps, measured and simulated."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqtrain.report import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Beyond this many panels only the first ones are drawn.
PANELS = 6


def draw_scans(rows: Sequence[Any], path: Path) -> None:
    """Median time of every method, one panel per rank count and form: bars for one size, lines over several."""
    panels = list(dict.fromkeys((row.ranks, row.form) for row in rows))[:PANELS]
    across = 1 if len(panels) == 1 else 2
    down = -(-len(panels) // across)
    figure = new_figure(8 * across, 5 * down)
    for axes, (ranks, form) in zip(figure.subplots(down, across, squeeze=False).flat, panels, strict=False):
        own = [row for row in rows if (row.ranks, row.form) == (ranks, form)]
        axes.set_title(f"All-Scan, {ranks} ranks, {form} transition")
        if len({row.state_kib for row in own}) == 1:
            title = f"median time of a scan of {own[0].state_kib:g} KiB, ms"
            _bars(axes, {row.method: row.median_ms for row in own}, own[0].median_ms / own[0].limit_ratio, title)
        else:
            _lines(axes, own)
    save_figure(figure, path)


def draw_steps(rows: Sequence[Any], path: Path, title: str) -> None:
    """Median time of a step of every chain, and of compute alone, one panel per rank count."""
    counts = list(dict.fromkeys(row.ranks for row in rows))
    figure = new_figure(8, 3.5 * len(counts))
    for axes, ranks in zip(figure.subplots(len(counts), 1, squeeze=False).flat, counts, strict=True):
        own = [row for row in rows if row.ranks == ranks]
        axes.set_title(f"{title}, {ranks} ranks")
        _bars(axes, {row.method: row.median_ms for row in own}, own[0].compute_ms, "median time of a step, ms")
    save_figure(figure, path)


def draw_efficiency(points: Sequence[Any], path: Path, title: str) -> None:
    """Efficiency over ranks: the median, and a band from the lowest to the highest quantile."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for name in dict.fromkeys(point.scheme for point in points):
        own = [point for point in points if point.scheme == name]
        ranks, efficiency = [p.ranks for p in own], [p.efficiency for p in own]
        axes.plot(ranks, [e[1] for e in efficiency], marker="o", markersize=3, label=name)
        axes.fill_between(ranks, [e[0] for e in efficiency], [e[-1] for e in efficiency], alpha=0.25)
    axes.set_xscale("log", base=2)
    axes.set(ylim=(0, 1.05), xlabel="ranks of one sequence", ylabel="compute alone / step, simulated", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=150)


def _bars(axes: "Axes", medians: dict[str, float], limit: float, title: str) -> None:
    colors = ["tab:orange" if "their" in name else "tab:blue" for name in medians]
    bars = axes.barh(list(medians), list(medians.values()), color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(limit, color="black", label="limit")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(title)
    axes.legend()


def _lines(axes: "Axes", rows: Sequence[Any]) -> None:
    """One line per method over the size of the state; the limit of the links is each point over its ratio."""
    names = list(dict.fromkeys(row.method.split(" = ")[0] for row in rows))
    for name in names:
        own = [row for row in rows if row.method.split(" = ")[0] == name]
        style = "-" if name == "auto" else "--" if name.startswith("their") else ":"
        sizes, medians = [row.state_kib for row in own], [row.median_ms for row in own]
        axes.plot(sizes, medians, style, marker="o", linewidth=3 if name == "auto" else 1, label=name)
    limits = {row.state_kib: row.median_ms / row.limit_ratio for row in rows}
    axes.plot(list(limits), list(limits.values()), "k-", marker="_", label="limit of the links")
    axes.set(xscale="log", yscale="log", xlabel="state, KiB", ylabel="median time of a scan, ms")
    axes.legend(fontsize=7, ncols=2)
