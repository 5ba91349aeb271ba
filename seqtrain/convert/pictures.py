"""The pictures of a conversion's report, in one file."""

from pathlib import Path
from typing import Any

from seqtrain.report import new_figure, save_figure

COLORS = {"teacher": "tab:blue", "student": "tab:orange", "start": "tab:gray"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Perplexity by position, errors of layers, ablations, and cache by length, drawn into `path` (PNG)."""
    figure = new_figure(11, 8)
    places = figure.subplots(2, 2)
    _positions(places[0, 0], report)
    _layers(places[0, 1], report["layer_errors"])
    _ablations(places[1, 0], report["end"]["texts"])
    _cache(places[1, 1], report["cache_bytes_float32"])
    save_figure(figure, path, dpi=100)


def _positions(axes: Any, report: dict[str, Any]) -> None:
    axes.set(title="perplexity by position", xlabel="token of the text", ylabel="perplexity", yscale="log")
    trained = report["start"] != report["end"]
    for style, (name, end) in zip(
        ("-", "--", ":", "-.") * len(report["end"]["texts"]), report["end"]["texts"].items(), strict=False
    ):
        curves = {"teacher": (end, "teacher"), "student": (end, "student")}
        if trained:
            curves["start"] = (report["start"]["texts"][name], "student")
        for label, (found, key) in curves.items():
            rows = found["by_position"]
            edges = [rows[0]["from"], *(row["to"] for row in rows)]
            axes.stairs(
                [row[key] for row in rows],
                edges,
                baseline=None,
                label=f"{name}, {label}",
                color=COLORS[label],
                linestyle=style,
            )
    axes.legend(fontsize="small")


def _layers(axes: Any, errors: dict[str, list[float]]) -> None:
    axes.set(title="error of each layer on its teacher's input", xlabel="layer", ylabel="relative error")
    for when, values in errors.items():
        axes.plot(range(len(values)), values, marker="o", markersize=3, label=when)
    axes.legend(fontsize="small")


def _ablations(axes: Any, texts: dict[str, Any]) -> None:
    axes.set(title="with parts switched off", ylabel="perplexity", yscale="log")
    models = list(next(iter(texts.values()))["perplexity"])
    width = 0.8 / len(texts)
    for number, (name, text) in enumerate(texts.items()):
        places = [index + number * width for index in range(len(models))]
        axes.bar(places, [text["perplexity"][model] for model in models], width, label=name)
    axes.set_xticks(
        [index + 0.4 - width / 2 for index in range(len(models))], [model.replace(", ", "\n") for model in models]
    )
    axes.legend(fontsize="small")


def _cache(axes: Any, cache: list[dict[str, int]]) -> None:
    axes.set(title="cache of one sequence, float32", xlabel="tokens seen", ylabel="bytes", xscale="log", yscale="log")
    for name in ("teacher", "student"):
        axes.plot(
            [row["tokens"] for row in cache], [row[name] for row in cache], marker="o", label=name, color=COLORS[name]
        )
    axes.legend(fontsize="small")
