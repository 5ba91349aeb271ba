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
import textwrap
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import Count, compile_example, count_in_child, find_examples
from seqtrain.report import WIDTH, announced, machine, write_json

T = TypeVar("T")
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
            with announced(f"compiling {name} for {target}"):
                rows = compile_example(name, target)
            yield from rows
        return
    with ProcessPoolExecutor(settings.jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(compile_example, *zip(*pairs, strict=True)):
            yield from rows


HEADER = (
    f"{'  kernel and flags':38} {'target':7} {'warps':>5} {'stages':>6} {'regs':>5} {'spill':>6} {'shared':>7} "
    f"{'blocks':>6}\n      matrix and copy instructions"
)


def line_of(row: dict) -> str:
    """A row of the table of kernels."""
    instructions = {**row["matrix"], **row["copies"]}
    flags = [name for name, value in row["arguments"].items() if value == "True" and name.isupper()]
    kernel = " ".join([row["kernel"], *flags])
    text = (
        f"  {kernel[:36]:36} {row['target']:7} {row['warps']:5} {row['stages']:6} {row['registers']:5} "
        f"{row['spilled']:6} {row['shared']:7} {row['blocks']:6}"
    )
    found = " ".join(f"{name}:{count}" for name, count in instructions.items())
    own = [textwrap.fill(found, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)] if found else []
    return "\n".join([text, *own, *(f"    FAULT: {fault}" for fault in row["faults"])])


COUNT_HEADER = f"\n{'  direction':11} {'launches':>8} {'bytes/token':>14} {'floor':>9} {'ratio':>6} {'FLOPs/token':>14}"


def line_of_count(count: Count) -> str:
    """A row of the table of bytes and FLOPs."""
    return (
        f"  {count.direction:9} {count.launches:8} {count.bytes:14.0f} {count.floor:9.0f} "
        f"{count.bytes / count.floor:6.2f} {count.flops:14.0f}"
    )


def under_headings(rows: Iterable[tuple[str, str]]) -> None:
    """Prints lines as they come, each below the name of its example, said once."""
    last = ""
    for example, line in rows:
        if example != last:
            print(example)
        last = example
        print(line, flush=True)


def _kept(found: Iterable[T], kept: list[T]) -> Iterator[T]:
    """Those that are found, as they come; all of them are in `kept` then."""
    for one in found:
        kept.append(one)
        yield one


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if "TRITON_INTERPRET" in os.environ:
        # This process may have imported Triton as an interpreter, but is to compile.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "seqtrain.cli", "kernel-report", *arguments], environment)
    if reason := unavailable():
        raise ConfigError(f"kernel-report {reason}")
    names = chosen(settings)
    rows: list[dict] = []
    counts: list[Count] = []
    print(HEADER)
    under_headings((row["example"], line_of(row)) for row in _kept(compile_all(names, settings), rows))
    if settings.count:
        print(COUNT_HEADER)
        with announced("counting bytes and FLOPs in Triton's interpreter"):
            under_headings((count.example, line_of_count(count)) for count in _kept(count_in_child(names), counts))
    faults = sum(len(row["faults"]) for row in rows)
    print(f"\n{len(rows)} kernels compiled, {faults} faults; not run on any GPU")
    path = Path(settings.output_dir) / "kernel_report.json"
    results = {"kernels": rows, "counts": list(map(asdict, counts))}
    write_json(path, {"machine": machine(), "settings": asdict(settings), **results})
    print(path)
    return 1 if faults else 0
