"""Compiles every Triton kernel for four GPUs, none of which needs to be here, and reports the machine code.

    python tools/kernel_report.py                                       # all examples, all targets; minutes at first
    python tools/kernel_report.py examples=[scan] targets=[sm_90] count=false
    python tools/kernel_report.py examples=[delta_rule] output_dir=outputs/before

One row per kernel, pinned configuration and target: registers and spilled bytes per thread, shared memory, blocks that
fit on a multiprocessor, matrix and copy instructions. Then, counted in Triton's interpreter, HBM bytes and FLOPs of
matrix products per token (B T) of each example, next to the floor: inputs read once, outputs written once. Nothing is
timed, and neither a GPU nor a CUDA toolkit is needed. Writes `kernel_report.json` to `output_dir`.

Exit status 1 if a configuration spills more than its target's limit (0 bytes; 64 on sm_80 and gfx942), takes more
shared memory than a block has, or loses its matrix instructions.
"""

import hashlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

import seqtrain.kernels
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.files import remembered
from seqtrain.kernels.gpu import unavailable
from seqtrain.kernels.inspect.examples import Count, compile_example, count_in_child, find_examples
from seqtrain.kernels.native.build import cache_folder
from seqtrain.report import WIDTH, machine, version, write_json

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
    # Processes that compile and count; 0: as many as there are cores.
    jobs: Annotated[int, Field(ge=0)] = 0
    # Folder for the results.
    output_dir: str = "outputs/kernel_report"


def chosen(settings: Settings) -> list[str]:
    """Names of the requested examples. Raises `ConfigError` if there are none."""
    names = list(find_examples())
    wanted = [name for name in names if not settings.examples or any(part in name for part in settings.examples)]
    if not wanted:
        raise ConfigError(f"examples={settings.examples}: none has such a name. Known: {'; '.join(names)}")
    return wanted


def work_through(names: list[str], settings: Settings) -> tuple[list[dict], list[Count]]:
    """Compiles and counts in processes side by side, and shows rows as they come, in their order.

    What has been done for the same sources and packages before is read from the user's cache folder.
    """
    pairs = [(name, target) for name in names for target in settings.targets]
    tasks: list[tuple[Callable[..., list[dict]], tuple[str, ...]]] = [(compile_example, pair) for pair in pairs]
    tasks += [(count_in_child, (name,)) for name in names] if settings.count else []
    rows: list[dict] = []
    counts: list[Count] = []
    jobs, kept = settings.jobs or os.cpu_count() or 1, kept_results()
    with ThreadPoolExecutor(jobs) as threads, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:

        def result(function: Callable[..., list[dict]], arguments: tuple[str, ...]) -> list[dict]:
            # Counting starts a process of its own; the threads bound them all.
            run = function if function is count_in_child else lambda *x: pool.submit(function, *x).result()
            return kept(function.__name__, arguments, lambda: run(*arguments))

        found = threads.map(result, *zip(*tasks, strict=True))
        print(HEADER)
        under_headings((row["example"], line_of(row)) for row in _kept(told(found, pairs), rows))
        if settings.count:
            print(COUNT_HEADER)
            more = (Count(**{**each, "kernels": tuple(each["kernels"])}) for each in told(found, names))
            under_headings((count.example, line_of_count(count)) for count in _kept(more, counts))
    return rows, counts


def told(found: Iterator[list[dict]], tasks: Sequence[Any]) -> Iterator[dict]:
    """The rows of the next results, one for each of `tasks`, with a line of progress on stderr before each."""
    for number, task in enumerate(tasks, 1):
        about = task if isinstance(task, str) else " for ".join(task)
        print(f"{number} of {len(tasks)}: {about}", file=sys.stderr, flush=True)
        yield from next(found)


Work = Callable[[], list[dict]]


def kept_results() -> Callable[[str, tuple[str, ...], Work], list[dict]]:
    """What gives the result of a piece of work by its name, from the cache folder where it is there."""
    folder = cache_folder().parent / "kernel_report"
    state = hashlib.sha256()
    for package in ("torch", "triton"):
        state.update(version(package).encode())
    for file in sorted(Path(seqtrain.kernels.__file__).parent.rglob("*.py")):
        state.update(file.read_bytes())

    def kept(name: str, arguments: tuple[str, ...], work: Work) -> list[dict]:
        key = hashlib.sha256("\0".join((state.hexdigest(), name, *arguments)).encode()).hexdigest()[:32]
        return remembered(folder / f"{key}.json", list, work)

    return kept


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
    rows, counts = work_through(names, settings)
    faults = sum(len(row["faults"]) for row in rows)
    print(f"\n{len(rows)} kernels compiled, {faults} faults; not run on any GPU")
    path = Path(settings.output_dir) / "kernel_report.json"
    results = {"kernels": rows, "counts": list(map(asdict, counts))}
    write_json(path, {"machine": machine(), "settings": asdict(settings), **results})
    print(path)
    return 1 if faults else 0
