"""Pictures of a run: its loss, and what was measured of its parts."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqtrain.report import new_figure, save_figure
from seqtrain.runtime.metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What every measured step says.
MEASURED = "peak_memory_bytes"
# Lines of a picture that compare times of a run: so many parts of it, each a mean.
PARTS = 4


def draw_loss(records: list[Record], path: Path, *, bytes_per_token: float | None) -> None:
    """Draws loss and held-out figures against the steps into `path`.

    In bits per byte where `bytes_per_token` of the training text is known, else in nats per token.
    """
    unit, factor = "nats per token", 1.0
    if bytes_per_token:
        unit, factor = "bits per byte", 1 / (math.log(2) * bytes_per_token)
    figure = new_figure(7, 4)
    axes = figure.add_subplot(title=f"{path.parent.name}: loss", xlabel="step", ylabel=f"loss ({unit})")
    finite = [record for record in records if record["loss"] is not None]
    axes.plot([r["step"] for r in finite], [factor * r["loss"] for r in finite], linewidth=1, label="training")
    scored = [record for record in records if record.get("held_out_bits_per_byte") is not None]
    if scored and bytes_per_token:
        axes.plot([r["step"] for r in scored], [r["held_out_bits_per_byte"] for r in scored], "o-", label="held out")
    lines = axes.get_lines()
    if scored := [record for record in records if record.get("held_out_accuracy") is not None]:
        right = axes.twinx()
        right.set_ylabel("accuracy on held-out rows")
        right.plot([r["step"] for r in scored], [r["held_out_accuracy"] for r in scored], "o-", color="tab:orange")
        right.get_lines()[0].set_label("held-out accuracy")
        lines = [*lines, *right.get_lines()]
    axes.legend(handles=lines)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_figures(records: list[Record], path: Path) -> None:
    """Draws learning rate, speed, memory, and all that was measured by part, against the steps; into `path`.

    Does nothing where no step was measured.
    """
    if not any(MEASURED in record for record in records):
        return
    panels = [_draw_rate, _draw_speed, _draw_memory, _draw_norms("grad_norm", "gradient's norm, before clipping")]
    panels += [_draw_norms("update_norm", "norm of a step's change"), _draw_places]
    if any(name.startswith("loss_of/") for record in records for name in record):
        panels.append(_draw_sources)
    figure = new_figure(14, 3.8 * math.ceil(len(panels) / 3))
    figure.suptitle(path.parent.name)
    for number, draw in enumerate(panels, 1):
        axes = figure.add_subplot(math.ceil(len(panels) / 3), 3, number)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        draw(axes, records)
    save_figure(figure, path)


def _line(axes: "Axes", records: Sequence[Record], name: str, *, factor: float = 1.0, label: str = "") -> None:
    """The figure `name` where it was measured and is a number."""
    points = [(record["step"], factor * record[name]) for record in records if record.get(name) is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1, label=label)


def _draw_rate(axes: "Axes", records: Sequence[Record]) -> None:
    _line(axes, records, "lr")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)


def _draw_speed(axes: "Axes", records: Sequence[Record]) -> None:
    _line(axes, records, "tokens_per_second")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    if any(record.get("mfu") for record in records):
        right = axes.twinx()
        points = [(record["step"], 100 * record["mfu"]) for record in records if record.get("mfu") is not None]
        right.plot([x for x, _ in points], [y for _, y in points], ".", color="tab:orange")
        right.set_ylabel("MFU, % (dots)", color="tab:orange")
        right.set_ylim(bottom=0)


def _draw_memory(axes: "Axes", records: Sequence[Record]) -> None:
    _line(axes, records, "peak_memory_bytes", factor=2**-30)
    axes.set_ylabel("most memory of a rank so far, GiB")
    axes.set_ylim(bottom=0)


def _draw_norms(prefix: str, label: str) -> Callable[["Axes", Sequence[Record]], None]:
    def draw(axes: "Axes", records: Sequence[Record]) -> None:
        for name in _names(records, prefix):
            # Where the rate is 0, nothing changes, and 0 has no logarithm.
            _line(axes, [each for each in records if each.get(name)], name, label=name.partition("/")[2])
        axes.set(ylabel=label, yscale="log")
        axes.legend(fontsize=8)

    return draw


def _draw_places(axes: "Axes", records: Sequence[Record]) -> None:
    names = _names(records, "loss_at")
    places = [int(name.partition("/")[2].partition("-")[0]) for name in names]
    measured = [record for record in records if MEASURED in record]
    size = math.ceil(len(measured) / PARTS)
    for number, first in enumerate(range(0, len(measured), size)):
        part = measured[first : first + size]
        means = [_mean([record[name] for record in part if record.get(name) is not None]) for name in names]
        color = str(0.75 * (1 - (number + 1) * size / (len(measured) + size)))
        label = f"steps {part[0]['step']} to {part[-1]['step']}"
        axes.plot(places, means, "o-", markersize=3, linewidth=1, color=color, label=label)
    axes.set(xlabel="tokens of the document before", ylabel="loss, nats per token", xlim=(-0.2, None))
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.legend(fontsize=8)


def _draw_sources(axes: "Axes", records: Sequence[Record]) -> None:
    for name in _names(records, "loss_of"):
        _line(axes, records, name, label=name.partition("/")[2])
    axes.set_ylabel("loss by source, nats per token")
    axes.legend(fontsize=8)


def _names(records: Sequence[Record], prefix: str) -> list[str]:
    """The figures under `prefix/`, in the order of the records; places in their own."""
    found = dict.fromkeys(name for record in records for name in record if name.startswith(f"{prefix}/"))
    return sorted(found, key=lambda name: int(name[8:].partition("-")[0])) if prefix == "loss_at" else list(found)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
