"""Compares recipes of conversion on one teacher: the same texts, the same tokens, then the same seconds.

    python tools/compare_recipes.py source=path/to/SmolLM2-135M
    python tools/compare_recipes.py source=model.gguf tokens=20000 'recipes=[transfer_then_kl,lolcats,radlads]'
    python tools/compare_recipes.py source=model.gguf timed=false 'common=[data=text,data.path=~/books]'

Each recipe converts to what its paper converts to (target, layers kept, window: `CONVERSIONS`). Stages keep their
shares of the tokens; all recipes have `tokens` of them, and then as many as fit into the seconds that the first
recipe's steps took. One yardstick for all: the perplexity of a window with sinks, untrained. Conversions lie below
`output_dir`; the same command goes on where it was stopped. A table is printed, and left in `report.html` beside
`recipes.png`; `results.json` has all numbers. Seconds mean something only on a machine that does nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import Field

from seqtrain.benchmarks.commits import run_here
from seqtrain.config import compose_config, read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.files import read_json
from seqtrain.report import (
    in_a_line,
    machine,
    new_figure,
    picture,
    save_figure,
    show_table,
    table,
    text,
    write_page,
    write_results,
)
from seqtrain.runtime.run_folder import read_lines
from seqtrain.validation import FilePath


@dataclass(frozen=True)
class Conversion:
    """What a recipe is run with, as published, and where that is."""

    reference: str
    overrides: tuple[str, ...]


PURE = "layer.window=0"
CONVERSIONS: Mapping[str, Conversion] = {
    "transfer_then_kl": Conversion("ours", ("target=gla", "layer.memory_weight=0.9")),
    "recall": Conversion("ours", ("target=gla", "layer.memory_weight=0.9", "keep=budget:{eighth}")),
    "liger": Conversion("arXiv 2503.01496", ("target=liger_gla",)),
    "lolcats": Conversion("arXiv 2410.10254", ("target=linear_attention",)),
    "radlads": Conversion("arXiv 2505.03005", ("target=gated_delta_net", PURE)),
    "halo": Conversion(
        "arXiv 2601.22156", ("target=retnet", PURE, "keep=budget:{quarter}", "keep_score=recall_per_kl")
    ),
    "priming": Conversion("AWS Hybrid Model Factory", ("target=gated_delta_net", PURE, "keep=every:2")),
    "taylor_calibrate": Conversion("arXiv 2606.16429", ("target=gated_delta_net", PURE, "keep=every:4")),
    "spikingbrain": Conversion("arXiv 2509.05276", ("target=gla", "layer.arrangement=alternate")),
    "quantvla": Conversion("arXiv 2602.20309", ("target=gla",)),
}
# What all are measured against: a window with sinks, its memory switched off.
YARDSTICK = ("recipe=none", "target=gla")
OFF = "student, memory off"


@dataclass(frozen=True)
class Settings:
    # Folder of a Hugging Face checkpoint, or a GGUF file.
    source: FilePath
    # Choices of `recipe=`; the first is the one whose seconds the others are given. Empty: all there are.
    recipes: tuple[str, ...] = ()
    # Tokens that the stages of a recipe train on.
    tokens: Annotated[int, Field(gt=0)] = 50_000
    # Longest sequence; stages of longer ones are cut to it.
    longest: Annotated[int, Field(gt=1)] = 2048
    # Tokens under the softmax where a recipe has a window; recall is asked from 1, 2, 4 and 8 times as far back.
    window: Annotated[int, Field(gt=0)] = 64
    # Whether all are run again for the same seconds.
    timed: bool = True
    # Overrides of all conversions.
    common: tuple[str, ...] = ()
    output_dir: str = "outputs/compare_recipes"


@dataclass(frozen=True)
class Result:
    """Of a finished conversion: its report, tokens trained on, and the seconds its steps took."""

    report: dict[str, Any]
    tokens: int
    seconds: float


class Conversions:
    """The conversions of a comparison, each made when it is first asked for."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folder = Path(settings.output_dir).absolute()
        self.recipes = settings.recipes or tuple(CONVERSIONS)
        for name in self.recipes:
            if name not in CONVERSIONS:
                raise ConfigError(unknown_name("recipes", name, CONVERSIONS))

    def yardstick(self) -> Result:
        """Without training."""
        return self._result("window", [*YARDSTICK, f"layer.window={self.settings.window}"])

    def result(self, name: str, tokens: int, depth: int) -> Result:
        """Of a recipe with so many tokens, for a teacher of so many layers. Raises `SeqtrainError` where it fails."""
        parts = {"eighth": max(1, round(depth / 8)), "quarter": max(1, round(depth / 4))}
        overrides = [f"recipe={name}", f"layer.window={self.settings.window}"]
        overrides += [word.format(**parts) for word in CONVERSIONS[name].overrides]
        if PURE in overrides:
            overrides.remove(f"layer.window={self.settings.window}")
        stages = OmegaConf.to_container(compose_config("convert", [*overrides, *self._common()]).recipe.stages)
        assert isinstance(stages, dict)
        overrides += steps_for(stages, tokens, self.settings.longest)
        return self._result(f"{name}-{tokens}", overrides)

    def _common(self) -> list[str]:
        recall = [times * self.settings.window for times in (1, 2, 4, 8)]
        return [f"source={self.settings.source}", f"verify.recall={recall}", *self.settings.common]

    def _result(self, name: str, overrides: Sequence[str]) -> Result:
        path = self.folder / "conversions" / name
        if not (path / "report.json").exists():
            print(f"{name}: {' '.join(overrides)}", flush=True)
            start([*overrides, *self._common(), f"output_dir={path}"])
        report = read_json(path / "report.json")
        records = [record for file in sorted(path.glob("training/*/metrics.jsonl")) for record in read_lines(file)]
        trained = sum(run["tokens"] for run in report["training"] if "loss" in run)
        return Result(report, trained, sum(record["step_seconds"] for record in records))


def steps_for(stages: Mapping[Any, Any], tokens: int, longest: int) -> list[str]:
    """Overrides with which the stages have so many tokens together, each as great a share as before."""
    words, shares = [], {}
    for name, stage in stages.items():
        if stage["kind"] != "calibrate":
            shares[name] = prod(stage[key] for key in ("steps", "batch_size", "sequence_length"))
    for name in stages:
        stage = stages[name]
        length = min(stage["sequence_length"], longest)
        words.append(f"recipe.stages.{name}.sequence_length={length}")
        if name in shares:
            wanted = tokens * shares[name] / sum(shares.values())
            words.append(f"recipe.stages.{name}.steps={max(1, round(wanted / (length * stage['batch_size'])))}")
    return words


def start(overrides: Sequence[str]) -> None:
    """Runs launch/convert.py. Raises `SeqtrainError` with its last line where it makes no report."""
    # 1: a check failed, and its report says which.
    run_here("launch/convert.py", overrides, statuses=(0, 1))


def compare(runs: Conversions) -> list[dict[str, Any]]:
    """A row for each recipe; the first is the yardstick, which no recipe trained."""
    settings, first = runs.settings, runs.yardstick()
    depth = len(first.report["layers"])
    rows = [_row("window and sinks", "no training", first, first)]
    budget = 0.0
    for name in runs.recipes:
        found = runs.result(name, settings.tokens, depth)
        rows.append(row := _row(name, CONVERSIONS[name].reference, found, first))
        budget = budget or found.seconds
        if settings.timed and found.seconds:
            fitting = max(1, round(found.tokens * budget / found.seconds))
            timed = found if name == runs.recipes[0] else runs.result(name, fitting, depth)
            row |= {"timed_tokens": timed.tokens, "timed_gap": gaps(timed.report, first.report)}
    return rows


def _row(name: str, reference: str, found: Result, first: Result) -> dict[str, Any]:
    report, student = found.report, OFF if found is first else "student"
    texts = report["end"]["texts"]
    return {
        "recipe": name,
        "reference": reference,
        "target": report["config"]["target"],
        "kept": len(report["kept"]),
        "tokens": found.tokens,
        "seconds": round(found.seconds, 1),
        "perplexity": {
            text: each["perplexity"].get(student, each["perplexity"]["student"]) for text, each in texts.items()
        },
        "teacher": {text: each["perplexity"]["teacher"] for text, each in texts.items()},
        "gap": gaps(report, first.report, student),
        "by_position": {
            text: [[row["from"], row["to"], row[student]] for row in each["by_position"]]
            for text, each in texts.items()
        },
        "recall": {str(row["tokens_between"]): row[student]["accuracy"] for row in report["end"]["recall"]},
        "teacher_recall": {str(row["tokens_between"]): row["teacher"]["accuracy"] for row in report["end"]["recall"]},
        "cache_bytes": report["cache_bytes_float32"][1]["student"],
        "failed": [check["name"] for check in report["checks"] if not check["passed"]],
    }


def gaps(report: Mapping[str, Any], first: Mapping[str, Any], student: str = "student") -> dict[str, float]:
    """For each text, the part of the gap between the yardstick and the teacher that is closed."""
    found = {}
    for name, each in report["end"]["texts"].items():
        teacher, start = each["perplexity"]["teacher"], first["end"]["texts"][name]["perplexity"][OFF]
        found[name] = (start - each["perplexity"][student]) / (start - teacher)
    return found


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the table of these rows."""
    texts, distances = list(rows[0]["perplexity"]), list(rows[0]["recall"])
    timed = [f"{text}, timed" for text in texts] if any("timed_gap" in row for row in rows) else []
    head = ["recipe", "reference", "target", "kept", "tokens", "seconds", *texts, *(f"{text} closed" for text in texts)]
    return [*head, *(f"recall {each}" for each in distances), "cache MiB", *timed]


def cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row as text, in the order of `columns_of`."""
    texts, distances = list(rows[0]["perplexity"]), list(rows[0]["recall"])
    found = [
        row["recipe"],
        row["reference"],
        row["target"],
        str(row["kept"]),
        f"{row['tokens']:,}",
        f"{row['seconds']:.0f}",
    ]
    found += [f"{row['perplexity'][text]:.2f}" for text in texts] + [f"{row['gap'][text]:.0%}" for text in texts]
    found += [f"{row['recall'][each]:.0%}" if each in row["recall"] else "-" for each in distances]
    found.append(f"{row['cache_bytes'] / 2**20:.1f}")
    if any("timed_gap" in each for each in rows):
        found += [f"{row['timed_gap'][text]:.0%}" if "timed_gap" in row else "-" for text in texts]
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Perplexity by position on each text, and recall by distance."""
    texts = list(rows[0]["perplexity"])
    figure = new_figure(5 * (len(texts) + 1), 4.5)
    places = figure.subplots(1, len(texts) + 1)
    for axes, name in zip(places, texts, strict=False):
        axes.axhline(rows[0]["teacher"][name], color="black", linestyle=":", label="teacher, all positions")
        for row in rows:
            axes.plot(
                [end for _, end, _ in row["by_position"][name]],
                [p for _, _, p in row["by_position"][name]],
                "o-",
                label=row["recipe"],
            )
        axes.set(title=f"perplexity by position, {name}", xlabel="up to token", xscale="log", yscale="log")
    for row in rows:
        places[-1].plot([int(each) for each in row["recall"]], list(row["recall"].values()), "o-", label=row["recipe"])
    places[-1].plot(
        [int(each) for each in rows[0]["teacher_recall"]],
        list(rows[0]["teacher_recall"].values()),
        "k:",
        label="teacher",
    )
    places[-1].set(title="recall", xlabel="tokens back", xscale="log", ylabel="likeliest token right")
    places[-1].legend(fontsize="x-small")
    for axes in places:
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    about = machine()
    print(in_a_line(about), flush=True)
    runs = Conversions(settings)
    rows = compare(runs)
    columns, shown = columns_of(rows), [cells(row, rows) for row in rows]
    show_table(columns, shown)
    teacher = ", ".join(f"{value:.2f} on {name}" for name, value in rows[0]["teacher"].items())
    notes = [
        f"teacher: {teacher}",
        *(f"{row['recipe']}: FAILED {'; '.join(row['failed'])}" for row in rows if row["failed"]),
    ]
    print("\n".join(notes))
    drawn = runs.folder / "recipes.png"
    draw(rows, drawn)
    sections = [("Recipes", table(columns, shown) + text(notes) + picture(drawn, "Perplexity and recall"))]
    sections.append(("Conditions", text([in_a_line(about), *settings.common])))
    write_page(runs.folder / "report.html", "Recipes of conversion", sections)
    write_results(runs.folder / "results.json", settings, about=about, rows=rows)
    return 0
