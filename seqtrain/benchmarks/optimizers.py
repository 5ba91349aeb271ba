"""Compares optimizers at equal steps and at equal seconds: bits per byte of held-out text, rates tuned, several seeds.

    python tools/compare_optimizers.py                                     # all, on the quickstart; hours
    python tools/compare_optimizers.py 'common=[train.steps=500,data=text,data.path=~/books]'
    python tools/compare_optimizers.py 'optimizers=[adamw,muon]' 'seeds=[0]' 'factors=[1]' 'common=[train.steps=20]'

First each optimizer's rate is tuned: of `factors` times its own, the one with which a run of another seed comes out
best. Then every seed is run at equal steps, and again with as many steps as fit into the seconds that the first
optimizer's steps take; only steps count, not evaluation or what comes before them. Runs lie below `output_dir`; the
same command goes on where it was stopped, and does nothing twice. Printed and left there: a table, `results.json`,
`report.html` and `optimizers.png`. Seconds mean something only on a machine that does nothing else; with `clock=cpu`
the processor's are compared, and others may work beside it.
"""

import hashlib
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Literal

from pydantic import Field

from seqtrain.benchmarks.commits import run_here
from seqtrain.config import compose_config, read_settings
from seqtrain.errors import ConfigError
from seqtrain.files import read_json, replace_file
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
from seqtrain.runtime.report import WARM_UP_STEPS
from seqtrain.runtime.run_folder import RunFolder, read_lines

EQUAL, TIMED = ("bits/byte", "spread", "against"), ("bits/byte in time", "spread", "against")
COLUMNS = ("optimizer", "rate", *EQUAL, "ms/step", "steps in time", *TIMED)
# In a run's folder: what it took.
CPU_SECONDS = "cpu_seconds.json"
QUIET = ("evaluation.every=0", "checkpoint.every=0", "sample.tokens=0")


@dataclass(frozen=True)
class Settings:
    # Choices of `optimizer=`; the first is what the others are compared with.
    optimizers: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "adamw",
        "muon",
        "soap",
        "lion",
        "aro",
        "schedule_free",
        "dct_adamw",
    )
    # Factors on each optimizer's own rate among which it is tuned.
    factors: Annotated[tuple[float, ...], Field(min_length=1)] = (0.3, 1.0, 3.0)
    # Seeds of the runs that are compared.
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    # Seed of the runs by which rates are tuned.
    tuning_seed: int = 100
    # Overrides of all runs.
    common: tuple[str, ...] = ("train.steps=200",)
    # Share by which the first optimizer's bits per byte must be beaten at equal seconds, on average, for one to win.
    margin: float = 0.03
    # Seconds that are compared: `wall`, as each step timed itself; `cpu`: the processor's over the run, less those of a
    # run of one step (needs runtime=inline on a CPU).
    clock: Literal["wall", "cpu"] = "wall"
    output_dir: str = "outputs/compare_optimizers"


@dataclass(frozen=True)
class Result:
    """Of a finished run: bits per byte of held-out text, and seconds of a step."""

    bits: float
    step_seconds: float


class Runs:
    """The runs of a comparison, each made when it is first asked for."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folder = Path(settings.output_dir).absolute()
        # Those of other settings are left alone.
        self.runs = self.folder / "runs" / hashlib.sha256(" ".join(settings.common).encode()).hexdigest()[:8]
        if settings.clock == "cpu" and self.config(settings.optimizers[0]).runtime.name != "inline":
            raise ConfigError("clock=cpu: counts processes that this one starts; set common=[runtime=inline, ...]")

    def config(self, name: str) -> Any:
        """What optimizer `name` is run with, but for rate, steps and seed."""
        return compose_config("pretrain", [f"optimizer={name}", *self.settings.common])

    def result(self, name: str, rate: float, seed: int, steps: int) -> Result:
        """Raises `SeqtrainError` where the run fails."""
        folder = self._run(name, rate, seed, steps)
        bits = read_json(folder.summary)["held_out_bits_per_byte"]
        if bits is None:
            raise ConfigError("common: nothing is held out to compare by; set data.held_out=")
        if self.settings.clock == "cpu":
            # The run of one step has everything else that a run has: start-up, evaluation, a checkpoint.
            rest = _cpu_seconds(self._run(name, self.config(name).optimizer.lr, self.settings.tuning_seed, 1))
            return Result(bits, (_cpu_seconds(folder) - rest) / max(1, steps - 1))
        seconds = [record["step_seconds"] for record in read_lines(folder.metrics)]
        return Result(bits, median(seconds[WARM_UP_STEPS:] or seconds))

    def _run(self, name: str, rate: float, seed: int, steps: int) -> RunFolder:
        path = self.runs / f"{name}-{rate:.3g}-seed{seed}-{steps}"
        overrides = [f"optimizer={name}", *self.settings.common, *QUIET]
        overrides += [f"optimizer.lr={rate!r}", f"seed={seed}", f"train.steps={steps}", f"output_dir={path}"]
        folder = RunFolder(path)
        if not folder.summary.exists():
            print(f"{name}: rate {rate:.3g}, seed {seed}, {steps} steps", flush=True)
            before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            start(overrides)
            spent = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
            replace_file(path / CPU_SECONDS, json.dumps(spent).encode())
        return folder

    def tuned(self, name: str) -> float:
        """The rate with which the tuning seed comes out best."""
        config = self.config(name)
        rates = [factor * config.optimizer.lr for factor in self.settings.factors]
        if len(rates) == 1:
            return float(rates[0])
        seed, steps = self.settings.tuning_seed, config.train.steps
        return float(min(rates, key=lambda rate: self.result(name, rate, seed, steps).bits))


def _cpu_seconds(folder: RunFolder) -> float:
    return float(read_json(folder.path / CPU_SECONDS))


def start(overrides: Sequence[str]) -> None:
    """Runs launch/pretrain.py. Raises `SeqtrainError` with its last line where it fails."""
    run_here("launch/pretrain.py", overrides)


def compare(runs: Runs) -> list[dict[str, Any]]:
    """A row for each optimizer; `seconds`: what its steps took a seed in the second comparison."""
    settings, rows = runs.settings, []
    budget = 0.0
    for name in settings.optimizers:
        rate, steps = runs.tuned(name), runs.config(name).train.steps
        found = [runs.result(name, rate, seed, steps) for seed in settings.seeds]
        step_seconds = median(each.step_seconds for each in found)
        budget = budget or steps * step_seconds
        fitting = max(1, round(budget / step_seconds))
        timed = [runs.result(name, rate, seed, fitting) for seed in settings.seeds]
        rows.append(
            {
                "optimizer": name,
                "rate": rate,
                "bits": [each.bits for each in found],
                "step_seconds": step_seconds,
                "timed_steps": fitting,
                "timed_bits": [each.bits for each in timed],
                "seconds": budget,
            }
        )
    return rows


def against(row: dict[str, Any], first: dict[str, Any], key: str) -> float:
    """By what share its mean bits are above the first optimizer's."""
    return mean(row[key]) / mean(first[key]) - 1


def cells(row: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`."""
    equal, timed = (
        (f"{mean(row[key]):.4f}", f"{max(row[key]) - min(row[key]):.4f}", f"{against(row, first, key):+.1%}")
        for key in ("bits", "timed_bits")
    )
    step = f"{1000 * row['step_seconds']:.0f}"
    return row["optimizer"], f"{row['rate']:.2g}", *equal, step, str(row["timed_steps"]), *timed


def verdict(rows: list[dict[str, Any]], margin: float) -> str:
    """Who wins at equal seconds, in a line."""
    first, *others = rows
    if not others:
        return f"{first['optimizer']} alone was run"
    best = min(others, key=lambda row: mean(row["timed_bits"]))
    gain = -against(best, first, "timed_bits")
    seeds = f"over {len(first['bits'])} seeds, {first['seconds']:.0f} s of steps each"
    if gain >= margin:
        return f"{best['optimizer']} beats {first['optimizer']} at equal seconds by {gain:.1%} {seeds}"
    return (
        f"none beats {first['optimizer']} at equal seconds by {margin:.0%}; the best, {best['optimizer']}, needs "
        f"{-gain:+.1%} {seeds}"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Each optimizer's bits per byte, a dot a seed, at equal steps and at equal seconds."""
    figure = new_figure(7, 1.2 + 0.45 * len(rows))
    axes = figure.add_subplot()
    kinds = (("bits", "equal steps", 0.15), ("timed_bits", f"equal seconds ({rows[0]['seconds']:.0f} s)", -0.15))
    for key, label, shift in kinds:
        dots = [(bits, index + shift) for index, row in enumerate(reversed(rows)) for bits in row[key]]
        axes.scatter([bits for bits, _ in dots], [place for _, place in dots], label=label, s=24)
    axes.set_yticks(range(len(rows)), [row["optimizer"] for row in reversed(rows)])
    axes.set_xlabel("bits per byte of held-out text")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    about = machine()
    print(in_a_line(about), flush=True)
    runs = Runs(settings)
    rows = compare(runs)
    shown, line = [cells(row, rows[0]) for row in rows], verdict(rows, settings.margin)
    show_table(COLUMNS, shown)
    print(line)
    drawn = runs.folder / "optimizers.png"
    draw(rows, drawn)
    sections = [("Bits per byte", table(COLUMNS, shown) + text([line]) + picture(drawn, "Bits per byte"))]
    sections.append(("Conditions", text([in_a_line(about), *settings.common])))
    write_page(runs.folder / "report.html", "Optimizers", sections)
    write_results(runs.folder / "results.json", settings, about=about, rows=rows, verdict=line)
    return 0
