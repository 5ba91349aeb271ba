"""Compares the throughput of training runs that differ in a few settings, run in turns under the same conditions.

    python tools/compare_settings.py                                  # the quickstart, backend auto against chunked
    python tools/compare_settings.py rounds=5
    python tools/compare_settings.py 'variants=[train.dtype=float32,train.dtype=bfloat16]' 'common=[train.steps=20]'

Each round starts every variant once, as its own run of launch/pretrain.py. A variant's speed is the median over its
steps of all rounds, the first few of each run left out; the ratio is to the last variant's. A table and
`compare_settings.json` are left in `output_dir`, and the runs' own folders.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from seqtrain.benchmarks.commits import run_here
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, SeqtrainError
from seqtrain.report import in_a_line, machine, show_table, write_results
from seqtrain.runtime.report import WARM_UP_STEPS
from seqtrain.runtime.run_folder import RunFolder, read_lines


@dataclass(frozen=True)
class Settings:
    # Overrides that make a variant, separated by blanks; the last is what the others are measured against.
    variants: Annotated[tuple[str, ...], Field(min_length=1)] = ("kernels.backend=auto", "kernels.backend=chunked")
    # Overrides of all variants.
    common: tuple[str, ...] = ("train.steps=25",)
    # Times each variant is run.
    rounds: Annotated[int, Field(gt=0)] = 3
    # What is run, a path in the checkout.
    program: str = "launch/pretrain.py"
    output_dir: str = "outputs/compare_settings"


def run_once(settings: Settings, variant: str, folder: Path) -> list[float]:
    """Tokens per second of one run's steps after the first few. Raises `SeqtrainError` where the run fails."""
    overrides = [*settings.common, *variant.split(), f"output_dir={folder}"]
    try:
        run_here(settings.program, overrides)
    except SeqtrainError as error:
        raise SeqtrainError(f"{variant}: {error}") from None
    speeds = [record["tokens_per_second"] for record in read_lines(RunFolder(folder).metrics)[WARM_UP_STEPS:]]
    if not speeds:
        raise ConfigError(f"common: train.steps must be more than {WARM_UP_STEPS}, those that are left out")
    return speeds


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    about = machine()
    print(in_a_line(about), flush=True)
    folder = Path(settings.output_dir).absolute()
    speeds: dict[str, list[float]] = {variant: [] for variant in settings.variants}
    for turn in range(settings.rounds):
        for number, variant in enumerate(settings.variants):
            found = run_once(settings, variant, folder / f"round_{turn}" / f"variant_{number}")
            speeds[variant] += found
            print(f"round {turn}  {median(found):10.0f} tokens/s  {variant}", flush=True)
    base = median(speeds[settings.variants[-1]])
    rows: list[dict[str, Any]] = [
        {"variant": name, "tokens_per_second": median(own), "ratio": median(own) / base, "steps": len(own)}
        for name, own in speeds.items()
    ]
    print()
    cells = [(row["variant"], f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.2f}") for row in rows]
    show_table(("variant", "tokens/s", "ratio"), cells)
    write_results(folder / "compare_settings.json", settings, about=about, rows=rows, speeds=speeds)
    return 0
