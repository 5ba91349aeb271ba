"""A conversion's report: numbers for programs, tables and pictures for people, the same byte for byte on every run.

What differs from run to run (paths, times, memory) is in a file of its own, `run.json`.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import seqtrain
from seqtrain.convert.pictures import draw
from seqtrain.convert.policy import write_layers
from seqtrain.convert.settings import ConvertConfig
from seqtrain.convert.sources import Source
from seqtrain.files import replace_file
from seqtrain.report import write_json

# What the config says of this machine's folders.
PLACES = ("source", "output_dir")


def heading(config: ConvertConfig, source: Source) -> dict[str, Any]:
    """What a report begins with: which code made what of which weights, without any path."""
    values = {key: value for key, value in asdict(config).items() if key not in PLACES}
    return {
        "seqtrain": seqtrain.__version__,
        "source": {
            "model_type": source.config.model_type,
            "sha256": source.sha256(),
            "quantised": source.quantised,
        },
        "config": _without_folders(values),
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def write(folder: Path, report: dict[str, Any], run: dict[str, Any]) -> None:
    """Writes `report.json`, `report.md`, `report.png`, `layers.json`, and `run.json`, into `folder`.

    `report`: `heading` and `layers: list[str]`, `kept: list[int]`, `layer_importance: list[float] | None`,
    `parameters: {teacher, student}`, `texts: {name: origin}`, `start`, `end` (of `Judge.measure`), `gap_closed`,
    `layer_errors: {when: list[float]}` in order of time, `cache_bytes_float32`, `generation: list`, `checks`, `passed`,
    `training: list` of the recipe's runs, `beside` (of `read_others`).
    """
    write_json(folder / "report.json", report, allow_nan=False)
    write_json(folder / "run.json", run, allow_nan=False)
    replace_file(folder / "report.md", as_markdown(report).encode("utf-8"))
    write_layers(folder / "layers.json", report["layers"], report["layer_importance"])
    draw(report, folder / "report.png")


def as_markdown(report: dict[str, Any]) -> str:
    """The numbers of `report` in tables, and what the model is and is not."""
    config, source = report["config"], report["source"]
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(Counter(report["layers"]).items()))
    lines = [
        f"# {config['target']} from {source['model_type']}",
        "",
        f"Layers: {counts}. Recipe: {config['recipe']['name']}. Weights: {config['dtype']}, "
        f"{report['parameters']['student']:,} parameters (teacher {report['parameters']['teacher']:,}).",
        f"Source sha256: `{source['sha256']}`.",
        "",
        "## What this model is, and is not",
        "",
        *(f"- {line}" for line in _character(report)),
        "",
        *_compared(report),
        "![perplexity by position, errors of layers, ablations, cache by length](report.png)",
        "",
        *_recalled(report["end"]["recall"]),
        *_answered(report["end"].get("answer")),
        "## Errors of layers, each on its teacher's own input",
        "",
        *_table(
            ["layer", "mixer", *report["layer_errors"]],
            [
                [str(index), name, *(f"{errors[index]:.4f}" for errors in report["layer_errors"].values())]
                for index, name in enumerate(report["layers"])
            ],
        ),
        "## Bytes of cache for one sequence",
        "",
        "By length, in float32:",
        "",
        *_table(
            ["tokens", "teacher", "student"],
            [[f"{row[key]:,}" for key in ("tokens", "teacher", "student")] for row in report["cache_bytes_float32"]],
        ),
        *_generated(report["generation"]),
        "## Checks",
        "",
        *(
            f"- {'passed' if check['passed'] else 'FAILED'}: {check['name']} "
            f"({check['error']:.3g}, at most {check['limit']:.3g})"
            for check in report["checks"]
        ),
        "",
    ]
    return "\n".join(lines)


def _compared(report: dict[str, Any]) -> list[str]:
    """Perplexities of each text: the teacher, the student at the start and at the end, whole and in part."""
    trained = report["start"] != report["end"]
    lines = []
    for name, end in report["end"]["texts"].items():
        start = report["start"]["texts"][name]
        models = [["teacher", end["perplexity"]["teacher"]]]
        for when, found in (("at the start", start), ("", end)) if trained else (("", end),):
            models += [
                [f"{model} {when}".strip(), value] for model, value in found["perplexity"].items() if model != "teacher"
            ]
        for other, figures in report["beside"].items():
            called = f"{other} ({figures['tokens_trained']:,} tokens)"
            models += [
                [f"{called}: {model}", value]
                for model, value in figures["perplexity"][name].items()
                if model != "teacher"
            ]
        columns = [key for key in end["by_position"][0] if key not in ("from", "to")]
        lines += [
            f"## Against the teacher on {name}: {end['tokens']:,} tokens of {report['texts'][name]}",
            "",
            *_table(["model", "perplexity"], [[model, f"{value:.2f}"] for model, value in models]),
            f"KL to the teacher: {end['kl_to_teacher']:.4f} nats a token. Same likeliest token: "
            f"{100 * end['top1_agreement']:.1f}%.",
        ]
        if trained:
            closed = report["gap_closed"][name]
            share = "there was none" if closed is None else f"{100 * closed:.1f}%"
            lines.append(f"Gap closed between the start (window and sinks) and the teacher: {share}.")
        rows = [
            [f"{row['from']} to {row['to']}", *(f"{row[key]:.2f}" for key in columns)] for row in end["by_position"]
        ]
        lines += ["", *_table(["positions", *columns], rows)]
    return lines


def _recalled(recall: dict[str, Any] | None) -> list[str]:
    if recall is None:
        return []
    rows = [
        [name, f"{each['surprise']:.2f}", f"{100 * each['accuracy']:.0f}%"]
        for name, each in recall.items()
        if name != "tokens_between"
    ]
    return [
        "## Recall beyond the window",
        "",
        f"A passage of random tokens comes a second time, {recall['tokens_between']} tokens after the first:",
        "",
        *_table(["model", "nats a token", "likeliest token right"], rows),
    ]


def _answered(answer: dict[str, Any] | None) -> list[str]:
    if answer is None:
        return []
    rows = [[name, repr(answer[name])] for name in ("teacher", "student")]
    return [f"## Asked to go on with {answer['prompt']!r}", "", *_table(["model", "answer"], rows)]


def _generated(rows: list[dict[str, int]]) -> list[str]:
    if not rows:
        return []
    cells = [[f"{row['tokens']:,}", f"{row['bytes']:,}"] for row in rows]
    return ["While the exported model generated, in its own number format:", "", *_table(["tokens", "bytes"], cells)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table and an empty one."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _character(report: dict[str, Any]) -> list[str]:
    """Sentences on what was made, and on what its numbers do not say."""
    target, kept = report["config"]["target"], report["kept"]
    depth = len(report["layers"])
    lines = [
        f"{depth - len(kept)} of {depth} layers are no softmax attention over all tokens: {target} is their memory."
    ]
    if kept:
        lines.append(
            f"Layers {', '.join(map(str, kept))} are softmax attention still: its cache grows with every token."
        )
    else:
        lines.append("No layer keeps all keys: its cache does not grow.")
    if report["source"]["quantised"]:
        file = report["source"]["quantised"]
        lines.append(f"Its teacher is the dequantised {file} file, not the model that file was made from.")
    if report["config"]["recipe"]["name"] == "none":
        lines.append("It was not trained after its attention was replaced: new parameters are as they were drawn.")
    for name, text in report["end"]["texts"].items():
        perplexities = text["perplexity"]
        off = perplexities.get("student, memory off")
        if off is not None and off <= perplexities["student"]:
            lines.append(
                f"Its memory does not help on {name}: perplexity is {off:.2f} without it and "
                f"{perplexities['student']:.2f} with it. What lies beyond the window is not used there."
            )
    lines.append("Perplexity on a few texts says little of what a model can do with facts that lie far back.")
    return lines
