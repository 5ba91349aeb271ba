"""A conversion's report: numbers for programs, tables and figures for people, the same byte for byte on every run.

What differs from run to run (paths, times, memory) is in a file of its own, `run.json`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import seqtrain
from seqtrain.convert.architecture import write_layers
from seqtrain.convert.settings import ConvertConfig
from seqtrain.errors import ConfigError
from seqtrain.files import read_json, replace_file
from seqtrain.models.source import Source
from seqtrain.report import new_figure, picture, save_figure, table, write_json, write_page
from seqtrain.report import text as paragraphs

# Keys of the config that name folders of this machine.
PLACES = ("source", "output_dir")
COLORS = {"teacher": "tab:blue", "student": "tab:orange", "start": "tab:gray"}


def heading(config: ConvertConfig, source: Source) -> dict[str, Any]:
    """What a report begins with: which code made what of which weights, without any path."""
    values = {key: value for key, value in asdict(config).items() if key not in PLACES}
    origin = {"model_type": source.config.model_type, "sha256": source.sha256(), "quantised": source.quantized}
    return {"seqtrain": seqtrain.__version__, "source": origin, "config": _without_folders(values)}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def read_others(folders: Iterable[str], report: dict[str, Any]) -> dict[str, Any]:
    """By name, perplexities, part of the gap closed and tokens trained on of the conversions in `folders`.

    `report`: of this conversion, with `source`, `texts` and `config`. Raises `ConfigError` for one of another teacher
    or other texts, whose figures can't be compared.
    """
    found = {}
    for folder in folders:
        file = Path(folder).expanduser() / "report.json"
        try:
            other = read_json(file)
            config = other["config"]
            same = {key: other[key] == report[key] for key in ("source", "texts")}
            for key in ("tokens", "sequences"):
                same[key] = config["verify"][key] == report["config"]["verify"][key]
            figures = {
                "tokens_trained": sum(run["tokens"] for run in other["training"]),
                "perplexity": {name: text["perplexity"] for name, text in other["end"]["texts"].items()},
                "gap_closed": other["gap_closed"],
            }
            name = f"{config['target']} by {config['recipe']['name']}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"beside={folder}: holds no report of a conversion ({error})") from None
        if differing := [key for key, equal in same.items() if not equal]:
            raise ConfigError(f"beside={folder}: can't be compared: not the same {differing[0]}")
        found[name] = figures
    return found


def write(folder: Path, report: dict[str, Any], run: dict[str, Any]) -> None:
    """Writes `report.json`, `report.md`, `report.html`, `report.png`, `layers.json`, and `run.json`, into `folder`.

    `report`: `heading` and `layers: list[str]`, `kept: list[int]`, `layer_importance: list[float] | None`,
    `layer_scores: {name: list[float]}`, `rank_correlations`,
    `parameters: {teacher, student}`, `texts: {name: origin}`, `start`, `end` (of `Evaluator.measure`), `gap_closed`,
    `layer_errors: {when: list[float]}` in order of time, `cache_bytes_float32`, `generation: list`, `checks`, `passed`,
    `training: list` of the recipe's runs, `beside` (of `read_others`).
    """
    write_json(folder / "report.json", report, allow_nan=False)
    write_json(folder / "run.json", run, allow_nan=False)
    markdown = as_markdown(report)
    replace_file(folder / "report.md", markdown.encode("utf-8"))
    draw(report, folder / "report.png")
    title, sections = as_html(markdown, folder)
    write_page(folder / "report.html", title, sections)
    write_layers(folder / "layers.json", report["layers"], report["layer_importance"], report["layer_scores"])


def as_markdown(report: dict[str, Any]) -> str:
    """The numbers of `report` in tables, and the limitations of the model."""
    config, source, parameters = report["config"], report["source"], report["parameters"]
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(Counter(report["layers"]).items()))
    errors = report["layer_errors"]
    generated = _table_of(report["generation"], "tokens", "bytes") if report["generation"] else ""
    rows = [
        [str(index), name, *(f"{each[index]:.4f}" for each in errors.values())]
        for index, name in enumerate(report["layers"])
    ]
    checks = [
        f"- {'passed' if check['passed'] else 'FAILED'}: {check['name']} "
        f"({check['error']:.3g}, at most {check['limit']:.3g})"
        for check in report["checks"]
    ]
    blocks = [
        f"# {config['target']} from {source['model_type']}",
        f"Layers: {counts}. Recipe: {config['recipe']['name']}. Weights: {config['dtype']}, "
        f"{parameters['student']:,} parameters (teacher {parameters['teacher']:,}).\n"
        f"Source sha256: `{source['sha256']}`.",
        "## What this model is, and is not",
        "\n".join(f"- {line}" for line in _character(report)),
        *_compared(report),
        "![perplexity by position, errors of layers, ablations, cache by length](report.png)",
        *_recalled(report["end"]["recall"]),
        *_answered(report["end"].get("answer")),
        *_scored(report),
        "## Errors of layers, each on its teacher's input",
        _table(["layer", "mixer", *errors], rows),
        "## Bytes of cache for one sequence",
        "By length, in float32:",
        _table_of(report["cache_bytes_float32"], "tokens", "teacher", "student"),
        *(["While the exported model generated, in its own number format:", generated] if generated else []),
        "## Checks",
        "\n".join(checks),
    ]
    return "\n\n".join(blocks) + "\n"


def as_html(markdown: str, folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """The title and the sections, as HTML, of what `as_markdown` gave; pictures are those in `folder`."""
    title, sections = "", [("Summary", "")]
    for block in markdown.strip().split("\n\n"):
        if block.startswith("# "):
            title = block[2:]
        elif block.startswith("## "):
            sections.append((block[3:], ""))
        else:
            heading, content = sections[-1]
            sections[-1] = heading, content + _html_of(block, folder)
    return title, sections


def _html_of(block: str, folder: Path) -> str:
    lines = block.splitlines()
    if block.startswith("| "):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
        return table(head, rows)
    if block.startswith("!["):
        name, _, file = block[2:-1].partition("](")
        return picture(folder / file, name)
    return paragraphs(line.removeprefix("- ").replace("`", "") for line in lines)


def _character(report: dict[str, Any]) -> Iterator[str]:
    """Sentences on what was made, and on what its numbers do not say."""
    target, kept, depth = report["config"]["target"], report["kept"], len(report["layers"])
    yield f"{depth - len(kept)} of {depth} layers no longer attend to all tokens; they use a {target} memory."
    if kept:
        yield f"Layers {', '.join(map(str, kept))} are still softmax attention: its cache grows with every token."
    else:
        yield "No layer keeps all keys: its cache does not grow."
    for what, layers in report["changed"].items():
        yield f"Attention that stayed {what}, unlike its teacher's: layers {', '.join(map(str, layers))}."
    if experts := report["config"]["upcycle"]["experts"]:
        yield f"Each layer's MLP became {experts} routed experts, copies of it at the start."
    if file := report["source"]["quantised"]:
        yield f"Its teacher is the dequantized {file} file, not the model that file was made from."
    if report["config"]["recipe"]["name"] == "none":
        yield "It was not trained after its attention was replaced: new parameters are as initialized."
    for name, text in report["end"]["texts"].items():
        perplexities = text["perplexity"]
        off = perplexities.get("student, memory off")
        if off is not None and off <= perplexities["student"]:
            yield (
                f"Its memory does not help on {name}: perplexity is {off:.2f} without it and "
                f"{perplexities['student']:.2f} with it. What lies beyond the window is not used there."
            )
    yield "Perplexity on a few texts says little about what a model can do with facts that lie far back."


def _compared(report: dict[str, Any]) -> Iterator[str]:
    """Perplexities of each text: the teacher, the student at the start and at the end, whole and in part."""
    trained = report["start"] != report["end"]
    for name, end in report["end"]["texts"].items():
        called = {" at the start": report["start"]["texts"][name]["perplexity"]} if trained else {}
        called[""] = end["perplexity"]
        models = [["teacher", f"{end['perplexity']['teacher']:.2f}"]]
        models += [[model + when, value] for when, found in called.items() for model, value in _students(found)]
        for other, figures in report["beside"].items():
            prefix = f"{other} ({figures['tokens_trained']:,} tokens): "
            models += [[prefix + model, value] for model, value in _students(figures["perplexity"][name])]
        yield f"## Against the teacher on {name}: {end['tokens']:,} tokens of {report['texts'][name]}"
        yield _table(["model", "perplexity"], models)
        closing = (
            f"KL to the teacher: {end['kl_to_teacher']:.4f} nats per token. Same likeliest token: "
            f"{100 * end['top1_agreement']:.1f}%."
        )
        if trained:
            closed = report["gap_closed"][name]
            share = "there was none" if closed is None else f"{100 * closed:.1f}%"
            closing += f"\nGap closed between the start (window and sinks) and the teacher: {share}."
        yield closing
        columns = [key for key in end["by_position"][0] if key not in ("from", "to")]
        rows = [
            [f"{row['from']} to {row['to']}", *(f"{row[key]:.2f}" for key in columns)] for row in end["by_position"]
        ]
        yield _table(["positions", *columns], rows)


def _students(perplexities: dict[str, float]) -> list[tuple[str, str]]:
    return [(model, f"{value:.2f}") for model, value in perplexities.items() if model != "teacher"]


def _recalled(recall: list[dict[str, Any]]) -> Iterator[str]:
    if recall:
        models = [name for name in recall[0] if name != "tokens_between"]
        rows = []
        for row in recall:
            found = [f"{100 * row[model]['accuracy']:.0f}% ({row[model]['surprise']:.2f})" for model in models]
            rows.append([str(row["tokens_between"]), *found])
        yield "## Recall"
        yield "A passage of random tokens is asked for again: how often the likeliest token is right (nats per token):"
        yield _table(["tokens back", *models], rows)


def _scored(report: dict[str, Any]) -> Iterator[str]:
    """How layers were scored, where they were."""
    if scores := report["layer_scores"]:
        values = report["layer_importance"]
        rows = [
            [str(index), *(f"{each[index]:.4g}" for each in scores.values()), f"{values[index]:.4g}"]
            for index in range(len(values))
        ]
        yield f"## Which layers matter, by {report['config']['keep_score']}"
        yield _table(["layer", *scores, "score"], rows)
        said = ", ".join(f"{value:.2f} ({names})" for names, value in report["rank_correlations"].items())
        yield f"Rank correlation of the scores: {said}."


def _answered(answer: dict[str, Any] | None) -> Iterator[str]:
    if answer is not None:
        yield f"## Continuations of {answer['prompt']!r}"
        yield _table(["model", "answer"], [[name, repr(answer[name])] for name in ("teacher", "student")])


def _table_of(rows: list[dict[str, int]], *columns: str) -> str:
    return _table(list(columns), [[f"{row[key]:,}" for key in columns] for row in rows])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def draw(report: dict[str, Any], path: Path) -> None:
    """Perplexity by position, errors of layers, ablations, and cache by length, drawn into `path` (PNG)."""
    figure = new_figure(11, 8)
    places = figure.subplots(2, 2)
    _draw_positions(places[0, 0], report)
    places[0, 1].set(title="error of each layer on its teacher's input", xlabel="layer", ylabel="relative error")
    for when, values in report["layer_errors"].items():
        places[0, 1].plot(range(len(values)), values, marker="o", markersize=3, label=when)
    _draw_ablations(places[1, 0], report["end"]["texts"])
    _draw_cache(places[1, 1], report["cache_bytes_float32"])
    for axes in places.flat:
        axes.legend(fontsize="small")
    save_figure(figure, path, dpi=100)


def _draw_positions(axes: Any, report: dict[str, Any]) -> None:
    axes.set(title="perplexity by position", xlabel="token of the text", ylabel="perplexity", yscale="log")
    start, ends = report["start"]["texts"], report["end"]["texts"]
    for style, (name, end) in zip(cycle(("-", "--", ":", "-.")), ends.items(), strict=False):
        curves = {"teacher": (end, "teacher"), "student": (end, "student")}
        if start != ends:
            curves["start"] = (start[name], "student")
        for label, (found, key) in curves.items():
            rows, look = found["by_position"], {"color": COLORS[label], "linestyle": style}
            edges = [rows[0]["from"], *(row["to"] for row in rows)]
            axes.stairs([row[key] for row in rows], edges, baseline=None, label=f"{name}, {label}", **look)


def _draw_ablations(axes: Any, texts: dict[str, Any]) -> None:
    axes.set(title="with parts switched off", ylabel="perplexity", yscale="log")
    models = list(next(iter(texts.values()))["perplexity"])
    width = 0.8 / len(texts)
    for number, (name, text) in enumerate(texts.items()):
        places = [index + number * width for index in range(len(models))]
        axes.bar(places, [text["perplexity"][model] for model in models], width, label=name)
    centers = [index + 0.4 - width / 2 for index in range(len(models))]
    axes.set_xticks(centers, [model.replace(", ", "\n") for model in models])


def _draw_cache(axes: Any, cache: list[dict[str, int]]) -> None:
    axes.set(title="cache of one sequence, float32", xlabel="tokens seen", ylabel="bytes", xscale="log", yscale="log")
    lengths = [row["tokens"] for row in cache]
    for name in ("teacher", "student"):
        axes.plot(lengths, [row[name] for row in cache], marker="o", label=name, color=COLORS[name])
