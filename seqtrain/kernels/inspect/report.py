"""Compiles every Triton kernel for four GPUs, none of which needs to be here, and reports the machine code.

    python tools/kernel_report.py                                       # all examples, all targets; minutes
    python tools/kernel_report.py examples=[scan] targets=[sm_90] count=false
    python tools/kernel_report.py examples=[delta_rule] output_dir=outputs/before

One row per kernel, pinned configuration and target: registers and spilled bytes per thread, shared memory, blocks that
fit on a multiprocessor, matrix and copy instructions. Then, counted in Triton's interpreter, HBM bytes and FLOPs of
matrix products per token (B T) of each example, next to the floor: inputs read once, outputs written once. Nothing is
timed, and neither a GPU nor a CUDA toolkit is needed. Writes `kernel_report.json` to `output_dir`.

Exit status 1 if a configuration spills more than its target's limit (0 bytes; 64 on sm_80 and gfx942), takes more
shared memory than a block has, or loses its matrix instructions.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import Count, compile_example, count_in_child, find_examples
from seqtrain.report import machine, write_json

Target = Literal["sm_80", "sm_90", "sm_100", "gfx942"]


@dataclass(frozen=True)
class Settings:
    # Examples whose names contain one of these words; empty: all.
    examples: list[str] = field(default_factory=list)
    targets: Annotated[list[Target], Field(min_length=1)] = field(
        default_factory=lambda: ["sm_80", "sm_90", "sm_100", "gfx942"]
    )
    # Also count bytes and FLOPs.
    count: bool = True
    # Number of compiling processes.
    jobs: Annotated[int, Field(gt=0)] = 1
    # Folder for the results.
    output_dir: str = "outputs/kernel_report"


def chosen(settings: Settings) -> list[str]:
    """Names of the requested examples. Raises `ConfigError` if there are none."""
    names = list(find_examples())
    wanted = [name for name in names if not settings.examples or any(part in name for part in settings.examples)]
    if not wanted:
        raise ConfigError(f"examples={settings.examples}: none has such a name. Known: {'; '.join(names)}")
    return wanted


def compile_all(names: list[str], settings: Settings) -> Iterator[dict]:
    """Rows as they come."""
    pairs = [(name, target) for name in names for target in settings.targets]
    if settings.jobs == 1:
        for name, target in pairs:
            yield from compile_example(name, target)
        return
    with ProcessPoolExecutor(settings.jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(compile_example, *zip(*pairs, strict=True)):
            yield from rows


HEADER = (
    f"{'example':60} {'kernel and flags':40} {'target':7} {'warps':>5} {'stages':>6} {'regs':>5} {'spill':>6} "
    f"{'shared':>7} {'blocks':>6}  matrix and copy instructions"
)


def line_of(row: dict) -> str:
    """A row of the table of kernels."""
    instructions = {**row["matrix"], **row["copies"]}
    flags = [name for name, value in row["arguments"].items() if value == "True" and name.isupper()]
    kernel = " ".join([row["kernel"], *flags])
    text = (
        f"{row['example']:60} {kernel[:40]:40} {row['target']:7} {row['warps']:5} {row['stages']:6} "
        f"{row['registers']:5} {row['spilled']:6} {row['shared']:7} {row['blocks']:6}  "
        + (" ".join(f"{name}:{count}" for name, count in instructions.items()) or "-")
    )
    return text + "".join(f"\n    FAULT: {fault}" for fault in row["faults"])


COUNT_HEADER = (
    f"\n{'example':60} {'direction':9} {'launches':>8} {'bytes/token':>14} {'floor':>9} {'ratio':>6} "
    f"{'FLOPs/token':>14}"
)


def line_of_count(count: Count) -> str:
    """A row of the table of bytes and FLOPs."""
    return (
        f"{count.example:60} {count.direction:9} {count.launches:8} {count.bytes:14.0f} {count.floor:9.0f} "
        f"{count.bytes / count.floor:6.2f} {count.flops:14.0f}"
    )


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if "TRITON_INTERPRET" in os.environ:
        # This process may have imported Triton as an interpreter, but is to compile.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "seqtrain.cli", "kernel-report", *arguments], environment)
    if reason := unavailable():
        raise ConfigError(f"kernel-report {reason}")
    names = chosen(settings)
    rows, counts = [], []
    print(HEADER)
    for row in compile_all(names, settings):
        rows.append(row)
        print(line_of(row), flush=True)
    if settings.count:
        print(COUNT_HEADER)
        for count in count_in_child(names):
            counts.append(asdict(count))
            print(line_of_count(count), flush=True)
    faults = sum(len(row["faults"]) for row in rows)
    print(f"\n{len(rows)} kernels compiled, {faults} faults; not run on any GPU")
    path = Path(settings.output_dir) / "kernel_report.json"
    write_json(path, {"machine": machine(), "settings": asdict(settings), "kernels": rows, "counts": counts})
    print(path)
    return 1 if faults else 0
