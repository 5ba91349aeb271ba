"""CPU time of this tree beside that of an earlier commit: a training step and the start-up of shipped presets.

    python tools/bench_regression.py OLD_COMMIT
    python tools/bench_regression.py OLD_COMMIT rounds=9 steps=20
    python tools/bench_regression.py OLD_COMMIT output_dir=outputs/regression

Both trees run in turns, in processes of their own. Start-up is the CPU time of a run of one step; a step is what each
further step adds to it. Exit status: 0, or 1 where the median of a figure's ratios, new over old, lies above 1 by more
than their spread (half their interquartile range), or by more than 3% where the spread is smaller.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from seqtrain.benchmarks.commits import ROOT, checkout, read_commit_settings, run_python
from seqtrain.report import machine, show_table, write_json

# Name -> the overrides that make a run of a few seconds out of a shipped preset, on one rank.
PRESETS: dict[str, tuple[str, ...]] = {
    "quickstart": ("train.sequence_length=512", "train.batch_size=4", "train.micro_batch_size=4"),
    "long_sequence": (
        "experiment=long_sequence",
        "parallel.sequence=1",
        "train.sequence_length=4096",
        "train.batch_size=1",
        "train.micro_batch_size=1",
    ),
    "gated_delta_net_attention_tiny": (
        "model=gated_delta_net_attention_tiny",
        "train.sequence_length=512",
        "train.batch_size=4",
        "train.micro_batch_size=4",
    ),
}
COMMON = (
    "runtime=inline",
    "parallel.data=1",
    "evaluation.every=0",
    "evaluation.max_tokens=1024",
    "checkpoint.every=1000",
    "checkpoint.resume=never",
    "sample.tokens=1",
    "optimizer.lr=1e-3",
)
TOLERANCE = 0.03


@dataclass(frozen=True)
class Settings:
    # The commit to compare this tree with.
    commit: str
    # Turns; each runs every preset in both trees, with one step and with `steps` more.
    rounds: Annotated[int, Field(ge=1)] = 5
    # Steps of the longer run beyond the first.
    steps: Annotated[int, Field(ge=1)] = 10
    # Presets to run, all where empty: quickstart, long_sequence, gated_delta_net_attention_tiny.
    presets: tuple[str, ...] = ()
    # Folder for the results.
    output_dir: str = "outputs/bench_regression"


@dataclass(frozen=True)
class Figure:
    """CPU seconds of one figure, a value per round, in both trees."""

    preset: str
    what: str
    old: list[float]
    new: list[float]

    @property
    def ratios(self) -> list[float]:
        return [new / old for new, old in zip(self.new, self.old, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of new over old."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half the interquartile range of the ratios."""
        if len(self.ratios) < 2:
            return 0.0
        quarters = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return (quarters[2] - quarters[0]) / 2

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + max(self.spread, TOLERANCE)


def measure(tree: Path, preset: str, steps: int) -> dict[str, float]:
    """CPU seconds of start-up with the first step, and of each of the `steps` that follow."""
    with tempfile.TemporaryDirectory() as folder:

        def run(count: int) -> float:
            own = [f"train.steps={count}", f"output_dir={folder}/{count}"]
            return run_python(tree, ["launch/pretrain.py", *PRESETS[preset], *COMMON, *own])

        start = run(1)
        return {"start-up": start, "step": (run(1 + steps) - start) / steps}


def compare(settings: Settings, old: Path, new: Path) -> list[Figure]:
    """Every figure of every preset, the trees in turns; which one begins alternates."""
    names = settings.presets or tuple(PRESETS)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    trees = [("old", old), ("new", new)]
    for _, tree in trees:
        # Builds native kernels, prepares the corpus and fills the file cache.
        measure(tree, names[0], 1)
    for number in range(settings.rounds):
        for preset in names:
            for side, tree in trees if number % 2 == 0 else trees[::-1]:
                for what, seconds in measure(tree, preset, settings.steps).items():
                    found.setdefault((preset, what), {"old": [], "new": []})[side].append(seconds)
    return [Figure(preset, what, **sides) for (preset, what), sides in found.items()]


def row(figure: Figure) -> tuple[str, ...]:
    old, new = (statistics.median(side) for side in (figure.old, figure.new))
    verdict = "SLOWER" if figure.slower else "ok"
    return (
        figure.preset,
        figure.what,
        f"{old:.3f}",
        f"{new:.3f}",
        f"{figure.ratio:.3f}",
        f"{figure.spread:.3f}",
        verdict,
    )


def main(arguments: list[str]) -> int:
    settings = read_commit_settings(Settings, arguments)
    about = machine()
    with checkout(settings.commit) as old:
        figures = compare(settings, old, ROOT)
    print(f"{about}, against {settings.commit}; CPU seconds, medians of {settings.rounds} rounds in turns")
    show_table(["preset", "what", "old", "new", "new/old", "spread", ""], [row(figure) for figure in figures])
    rows = [{**asdict(one), "ratio": one.ratio, "spread": one.spread, "slower": one.slower} for one in figures]
    path = Path(settings.output_dir) / "bench_regression.json"
    write_json(path, {"machine": about, "settings": asdict(settings), "figures": rows})
    print(path)
    return 1 if any(figure.slower for figure in figures) else 0
