"""CPU time of this tree beside that of an earlier commit: a training step and the start-up of shipped presets.

    python tools/bench_regression.py OLD_COMMIT
    python tools/bench_regression.py OLD_COMMIT rounds=9 steps=20
    python tools/bench_regression.py OLD_COMMIT output_dir=outputs/regression

Both trees run in turns, in processes of their own, whose CPU time is read whenever metrics.jsonl has another line:
start-up is what the first step's line took, a step the mean of those after the second. What is drawn at a run's end is
in neither. Exit status: 0, or 1 where the median of a figure's ratios, new over old, lies above 1 by more than their
spread (half their interquartile range), or by more than 3% where the spread is smaller.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import Field

from seqtrain.benchmarks.commits import ROOT, checkout, read_commit_settings, watch_python
from seqtrain.report import machine, median_and_spread, show_table, write_results

# Name -> the overrides that make a run of a few seconds out of a shipped preset, on one rank.
SMALL = "train.sequence_length=512 train.batch_size=4 train.micro_batch_size=4"
LONG = "parallel.sequence=1 train.sequence_length=4096 train.batch_size=1 train.micro_batch_size=1"
PRESETS = {
    "quickstart": SMALL,
    "long_sequence": f"experiment=long_sequence {LONG}",
    "gated_delta_net_attention_tiny": f"model=gated_delta_net_attention_tiny {SMALL}",
}
COMMON = """
runtime=inline parallel.data=1 evaluation.every=0 evaluation.max_tokens=1024 checkpoint.every=1000
checkpoint.resume=never sample.tokens=1 optimizer.lr=1e-3
"""
TOLERANCE = 0.03


@dataclass(frozen=True)
class Settings:
    # The commit to compare this tree with.
    commit: str
    # Turns; each runs every preset in both trees.
    rounds: Annotated[int, Field(ge=1)] = 5
    # Steps of a run beyond the second.
    steps: Annotated[int, Field(ge=1)] = 40
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

    def outcome(self) -> dict[str, float | bool]:
        """Median of new over old, half the interquartile range of these ratios, and whether that is slower."""
        ratio, spread = median_and_spread([new / old for new, old in zip(self.new, self.old, strict=True)])
        return {"ratio": ratio, "spread": spread, "slower": ratio > 1 + max(spread, TOLERANCE)}


def measure(tree: Path, cache: Path, preset: str, steps: int) -> dict[str, float]:
    """CPU seconds of start-up with the first step, and of each of the `steps` after the second.

    `cache`: of the tree's prepared text, whose form differs between commits.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = f"{PRESETS[preset]} {COMMON} data.cache_dir={cache} train.steps={2 + steps} output_dir={folder}".split()
        seconds = watch_python(tree, ["launch/pretrain.py", *words], Path(folder, "metrics.jsonl"))
    return {"start-up": seconds[0], "step": (seconds[-1] - seconds[1]) / steps}


def compare(settings: Settings, old: Path, new: Path, caches: Path) -> list[Figure]:
    """Every figure of every preset, the trees in turns; which one begins alternates. `caches`: an empty folder."""
    names = settings.presets or tuple(PRESETS)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    trees = [("old", old), ("new", new)]
    for side, tree in trees:
        # Builds native kernels, prepares the corpus and fills the file cache.
        measure(tree, caches / side, names[0], 1)
    for number in range(settings.rounds):
        for preset in names:
            for side, tree in trees if number % 2 == 0 else trees[::-1]:
                for what, seconds in measure(tree, caches / side, preset, settings.steps).items():
                    found.setdefault((preset, what), {"old": [], "new": []})[side].append(seconds)
    return [Figure(preset, what, **sides) for (preset, what), sides in found.items()]


def main(arguments: list[str]) -> int:
    settings = read_commit_settings(Settings, arguments)
    about = machine()
    with checkout(settings.commit) as old, tempfile.TemporaryDirectory() as caches:
        figures = compare(settings, old, ROOT, Path(caches))
    print(f"{about}, against {settings.commit}; CPU seconds, medians of {settings.rounds} rounds in turns")
    records = [asdict(figure) | figure.outcome() for figure in figures]
    rows = []
    for record in records:
        numbers = (median(record["old"]), median(record["new"]), record["ratio"], record["spread"])
        verdict = "SLOWER" if record["slower"] else "ok"
        rows.append((record["preset"], record["what"], *(f"{number:.3f}" for number in numbers), verdict))
    show_table(["preset", "what", "old", "new", "new/old", "spread", ""], rows)
    path = Path(settings.output_dir) / "bench_regression.json"
    write_results(path, settings, figures=records, about=about)
    print(path)
    return int(any(record["slower"] for record in records))
