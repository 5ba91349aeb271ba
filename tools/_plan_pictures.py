"""The picture of a plan: layouts side by side, what their time and memory are made of."""

from collections.abc import Sequence
from pathlib import Path

from seqtrain.analysis.layout import Prediction


def draw_plan(found: Sequence[Prediction], path: Path) -> None:
    """Bars of seconds and of GiB, a bar a layout, the first layout on top."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.8 + 0.42 * len(found)), layout="constrained")
    labels = [_label(one) for one in found]
    panels = (
        ("seconds a step", [one.seconds for one in found], 1.0),
        ("GiB a rank", [one.bytes for one in found], 2**30),
    )
    for index, (axes, (label, values, unit)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
        left = [0.0] * len(found)
        for number, name in enumerate(dict.fromkeys(name for one in values for name in one)):
            widths = [one.get(name, 0.0) / unit for one in values]
            axes.barh(labels, widths, left=left, label=name, color=colormaps["tab10"](number % 10))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set(xlabel=label)
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
        axes.grid(axis="x", alpha=0.3)
        if index:
            axes.axvline(found[0].room / unit, color="black", linestyle="--", linewidth=1)
            axes.set_yticklabels([])
    figure.savefig(path, dpi=120)


def _label(one: Prediction) -> str:
    layout = one.layout
    again = ", recomputed" if layout.checkpointing else ""
    return f"{layout.data} x {layout.sequence}, ZeRO {layout.stage}, {layout.micro_batch} row(s){again}"
