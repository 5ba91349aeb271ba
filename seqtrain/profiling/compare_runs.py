"""Compares two or more runs or profiles: losses, throughput, memory, where time goes, and settings that differ.

    python tools/compare_runs.py 'runs=[runs/before,runs/after]'                  # losses bit for bit
    python tools/compare_runs.py 'runs=[runs/a,runs/b,profiles/c]' tolerance=1e-5
    python tools/compare_runs.py 'runs=[profiles/a,profiles/b]' output_dir=outputs/a_and_b

Each is a folder that launch/pretrain.py or tools/profile_throughput.py wrote; all are compared with the first. The exit
status is 0 where every run has the first one's losses at every step, 1 where one has not, 2 for a mistake: so a change
that must not alter results can prove it. Printed and written to `output_dir` are a table, JSON and a picture.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from seqtrain.config import read_run_config, read_settings
from seqtrain.errors import ConfigError, SeqtrainError
from seqtrain.files import read_json
from seqtrain.profiling import by_kind
from seqtrain.report import new_figure, save_figure, show_table, write_json
from seqtrain.runtime.metrics import Record
from seqtrain.runtime.report import WARM_UP_STEPS
from seqtrain.runtime.run_folder import RunFolder, read_lines

MIB = 2**20
# Where a run lies says nothing of what it does.
PLACES = ("output_dir", "tracking.name")


@dataclass(frozen=True)
class Settings:
    # Folders of runs or profiles; the first is what the others are compared with.
    runs: Annotated[list[str], Field(min_length=2)]
    # Largest difference of a step's loss (nats per token) that counts as the same; 0: bit for bit.
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    # Folder for the results.
    output_dir: str = "outputs/compare_runs"


@dataclass(frozen=True)
class Run:
    """What a folder says. `profile`: the report of tools/profile_throughput.py, empty for a run without."""

    name: str
    config: dict[str, Any]
    records: list[Record]
    summary: dict[str, Any]
    profile: dict[str, Any]

    def by_step(self, key: str) -> dict[int, float]:
        """A value of metrics.jsonl; NaN for null, which stands there for one that was not finite."""
        return {record["step"]: math.nan if record[key] is None else record[key] for record in self.records}

    @property
    def tokens_per_second(self) -> float:
        """The profile's own figure; else the median over all steps but the warm-up."""
        if self.profile:
            return self.profile["tokens_per_second"]["median"]
        counted = self.records[WARM_UP_STEPS:] or self.records
        return statistics.median(record["tokens_per_second"] for record in counted)

    @property
    def peak_mib(self) -> float | None:
        """Of the fullest rank; None where the run has not finished."""
        own = [rank["peak_bytes"] for rank in self.profile.get("memory", [])]
        return max(own or [self.summary.get("peak_memory_bytes", 0)]) / MIB or None


@dataclass(frozen=True)
class Difference:
    """How the losses of a run differ from the first run's."""

    name: str
    same: bool
    # Steps that both have, and that only one has.
    common_steps: int
    other_steps: int
    # Largest difference of a loss, of a gradient norm; over the steps both have.
    loss: float
    grad_norm: float
    # First step whose losses differ by more than the tolerance; 0: none.
    first_step: int


def read_run(path: str) -> Run:
    """The run in `path`, or the one inside a profile. Raises `ConfigError` where there is none."""
    folder = Path(path)
    report = folder / "profile.json"
    try:
        profile = read_json(report) if report.exists() else {}
        run = RunFolder(folder / "run" if profile else folder)
        records = read_lines(run.metrics)
        if not records:
            raise ConfigError(f"runs={path}: no such run; expected a folder with metrics.jsonl, or with profile.json")
        config = profile["config"] if profile else read_run_config(run.path, key="runs")
        summary = read_json(run.summary) if run.summary.exists() else {}
        if not (isinstance(profile, dict) and isinstance(summary, dict)):
            raise ValueError(f"{report.name if profile else run.summary.name} holds no object")
    except SeqtrainError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"runs={path}: is damaged: {error}") from error
    return Run(path, config, records, summary, profile)


def distances(first: Run, other: Run, key: str) -> dict[int, float]:
    """`|a - b|` by common step; nothing between two values that aren't finite, infinity where one is."""
    ours, theirs = first.by_step(key), other.by_step(key)
    apart = {step: abs(ours[step] - theirs[step]) for step in sorted(ours.keys() & theirs.keys())}
    lost = {step: math.isnan(ours[step]) == math.isnan(theirs[step]) for step in apart}
    return {step: (0.0 if lost[step] else math.inf) if math.isnan(size) else size for step, size in apart.items()}


def difference(first: Run, other: Run, tolerance: float) -> Difference:
    """How the losses of `other` differ from those of `first`. Two that aren't finite are the same."""
    apart, norms = (distances(first, other, key) for key in ("loss", "grad_norm"))
    differing = [step for step, size in apart.items() if size > tolerance]
    alone = len(first.by_step("loss").keys() ^ other.by_step("loss").keys())
    return Difference(
        name=other.name,
        same=bool(apart) and not differing and not alone,
        common_steps=len(apart),
        other_steps=alone,
        loss=max(apart.values(), default=0.0),
        grad_norm=max(norms.values(), default=0.0),
        first_step=differing[0] if differing else 0,
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def changes(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings that are not the same in all configs: each one's value as JSON, "-" where it has none."""
    found = [flat(config) for config in configs]
    names = dict.fromkeys(name for config in found for name in config)
    values = {name: [json.dumps(config[name]) if name in config else "-" for config in found] for name in names}
    return {name: own for name, own in values.items() if len(set(own)) > 1}


def figures(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """The results of each run, and of profiles milliseconds of each part: rows of a table, one column per run."""
    speeds = [run.tokens_per_second for run in runs]
    parts = [{row["part"]: 1e3 * row["seconds"] for row in by_kind(run.profile.get("parts", []))} for run in runs]
    return {
        "steps": [len(run.records) for run in runs],
        "last loss": [run.records[-1]["loss"] for run in runs],
        "held-out bits per byte": [run.summary.get("held_out_bits_per_byte") for run in runs],
        "tokens/s": [*speeds],
        "tokens/s over the first's": [speed / speeds[0] for speed in speeds],
        "peak MiB of a rank": [run.peak_mib for run in runs],
    } | {f"ms of {name}": [own.get(name) for own in parts] for name in dict.fromkeys(n for own in parts for n in own)}


def cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def verdict(found: Difference, tolerance: float) -> str:
    """Whether a run has the first run's losses, in a line."""
    if found.same:
        how = "bit for bit" if tolerance == 0 else f"to {tolerance:g}: at most {found.loss:.3g} apart"
        where = f"all {found.common_steps} steps" if found.common_steps > 1 else "the only step"
        return f"{found.name}: the same losses at {where}, {how}"
    if not found.common_steps:
        return f"{found.name}: no step in common"
    common, others = (f"{n} step{'s' * (n != 1)}" for n in (found.common_steps, found.other_steps))
    said = [f"at most {found.loss:.3g} apart over {common}"]
    if found.first_step:
        said.append(f"differing first at step {found.first_step}")
    if found.other_steps:
        said.append(f"{others} exist{'s' * (found.other_steps == 1)} in only one run")
    return f"{found.name}: LOSSES DIFFER: {', '.join(said)} (gradient norms at most {found.grad_norm:.3g} apart)"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Losses, their distance from the first run's, and throughput, step by step."""
    figure = new_figure(14, 4.2)
    panels = figure.subplots(1, 3)
    losses, apart, speed = panels
    for number, run in enumerate(runs):
        style = {"color": f"C{number}", "linewidth": 1 + 0.8 * (len(runs) - number), "alpha": 0.8, "label": run.name}
        for axes, key in ((losses, "loss"), (speed, "tokens_per_second")):
            axes.plot(*zip(*run.by_step(key).items(), strict=True), **style)
        if number and (sizes := distances(runs[0], run, "loss")):
            apart.plot(*zip(*sizes.items(), strict=True), "o-", markersize=3, color=f"C{number}", label=run.name)
    # A logarithm near 0 that still shows 0.
    apart.set_yscale("symlog", linthresh=1e-9)
    apart.set_ylim(bottom=0)
    labels = ("loss (nats per token)", "distance from the first run's loss", "tokens per second")
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", integer=True)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    runs = [read_run(path) for path in settings.runs]
    found = [difference(runs[0], other, settings.tolerance) for other in runs[1:]]
    results = figures(runs)
    differing = {name: own for name, own in changes([run.config for run in runs]).items() if name not in PLACES}
    names = ["", *settings.runs]
    show_table(names, [(key, *map(cell, values)) for key, values in results.items()])
    if differing:
        show_table(["settings that differ", *names[1:]], [(key, *own) for key, own in differing.items()])
    print("\n".join(verdict(one, settings.tolerance) for one in found))
    same = all(one.same for one in found)
    report, picture = (Path(settings.output_dir) / f"compare_runs.{kind}" for kind in ("json", "png"))
    losses = [asdict(one) for one in found]
    for one in losses:
        # JSON has no infinity.
        one |= {key: one[key] if math.isfinite(one[key]) else None for key in ("loss", "grad_norm")}
    head = {"runs": settings.runs, "tolerance": settings.tolerance, "same": same}
    write_json(report, head | {"losses": losses, "figures": results, "settings": differing}, allow_nan=False)
    draw(runs, picture)
    print(f"{report}, {picture}")
    return 0 if same else 1
