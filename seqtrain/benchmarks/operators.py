"""Times the operators against other libraries' forms, SDPA and the processor's limit, all in one run, in turns.

    python tools/bench_operators.py                                   # 1k to 32k tokens, forward and forward + backward
    python tools/bench_operators.py tokens=[4096] operators=[delta_rule] rounds=9
    python tools/bench_operators.py tokens=4096 heads=[1,8] key_width=[64,128] value_width=0 threads=[1,2]

Lists are swept, each with each. Every round times each contender once, so that a busy moment of the machine falls on
all of them. Printed are medians, half the distance between the quartiles, and `theirs / ours`: above 1, ours is faster.
Rivals are Hugging Face's PyTorch forms; on a GPU flash-linear-attention and flash-attn, where they are installed.
`gemm_limit` is the time of the matrix products of the chunk form alone, in cache, on the chunk's own shapes; `idle` is
ours, where `busy=true` has the rows' own times taken while a second process uses as many threads. A table,
`bench_operators.json` and pictures are left in `output_dir`.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BeforeValidator, Field

from seqtrain import report
from seqtrain.benchmarks.contenders import Contender, Shape, all_contenders, limit_source
from seqtrain.config import read_settings

Operator = Literal[
    "delta_rule", "scalar_decay", "channel_decay", "kda", "diagonal_scan", "tensor_attention", "sliding_attention"
]
Dtype = Literal["float32", "bfloat16"]
Size = Annotated[int, Field(gt=0)]
# A list, for which its only entry may stand.
LISTED = (Field(min_length=1), BeforeValidator(lambda values: tuple(values) if isinstance(values, list) else (values,)))
Sizes = Annotated[tuple[Size, ...], *LISTED]
Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], *LISTED]
Dtypes = Annotated[tuple[Dtype, ...], *LISTED]
DIRECTIONS = {"forward": False, "forward+backward": True}
TABLE = report.LiveTable(
    {
        "tokens": "6d",
        "direction": "16",
        "operator": "18",
        "ours, ms": ">18",
        "theirs, ms": ">18",
        "ratio": "7.2f",
        " against": "",
    }
)
# What a second process does that keeps cores busy, as on a shared machine.
BUSY = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
a = torch.randn(512, 512)
print("ready", flush=True)
while True:
    a @ a
"""


@dataclass(frozen=True)
class Settings:
    # Lengths of the sequence, tokens; here and below a list is swept.
    tokens: Sizes = (1024, 2048, 4096, 8192, 16384, 32768)
    # Sequences in a batch.
    batch: Sizes = (1,)
    # Heads, and the width of keys and values of each; the diagonal scan has heads * value_width channels.
    heads: Sizes = (8,)
    key_width: Sizes = (64,)
    # 0: as wide as the keys.
    value_width: Counts = (64,)
    # Key width of tensor attention, whose features grow with its square; the mixer has 4 unless told otherwise.
    tensor_key_width: Size = 4
    # Keys that a query of the sliding attention sees.
    window: Size = 512
    operators: tuple[Operator, ...] = get_args(Operator)
    # Our backend: auto, chunked, reference, ...
    backend: str = "auto"
    # Our other backends to time as well, such as [chunked].
    beside: tuple[Literal["chunked", "native", "triton"], ...] = ()
    dtype: Dtypes = ("float32",)
    device: str = "cpu"
    # CPU threads; 0 leaves PyTorch's own number.
    threads: Counts = (0,)
    # True: times the matrix products alone, too (on a CPU).
    limit: bool = True
    # True: every contender is also timed while a second process uses as many threads.
    busy: bool = False
    # How often each contender is timed, and the seconds after which it is not timed again.
    rounds: Annotated[int, Field(gt=0)] = 7
    seconds: Annotated[float, Field(gt=0)] = 20.0
    output_dir: str = "outputs/bench_operators"


def shapes(settings: Settings) -> Iterator[Shape]:
    """Every point of the sweep."""
    names = ("batch", "heads", "key_width", "value_width", "dtype", "threads", "tokens")
    fixed = {name: getattr(settings, name) for name in ("tensor_key_width", "window", "device")}
    for values in itertools.product(*(getattr(settings, name) for name in names)):
        point = fixed | dict(zip(names, values, strict=True))
        point["value_width"] = point["value_width"] or point["key_width"]
        point["threads"] = point["threads"] or torch.get_num_threads()
        yield Shape(**point)


def time_in_turns(contenders: Mapping[str, Contender], settings: Settings, *, backward: bool) -> dict[str, list[float]]:
    """Seconds of each contender's runs: one untimed round, then rounds in which each runs once."""

    def now() -> float:
        if torch.device(settings.device).type == "cuda":
            torch.cuda.synchronize(settings.device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(settings.rounds + 1):
        for name, run in contenders.items():
            if sum(times[name]) > settings.seconds:
                continue
            start = now()
            run(backward)
            if turn:
                times[name].append(now() - start)
    return times


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """While it lasts, a second process multiplies matrices in so many threads."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def compare(settings: Settings, show: Callable[[str], None]) -> tuple[list[dict], dict[str, str]]:
    """One row for each shape, direction, operator and rival, shown as they come; and why rivals are missing."""
    rows: list[dict] = []
    missing: dict[str, str] = {}
    own_threads = torch.get_num_threads()
    previous = ""
    for shape in shapes(settings):
        torch.set_num_threads(shape.threads)
        if (where := describe(asdict(shape))) != previous:
            previous = where
            show(f"\n{where}\n{TABLE.header}")
        backends = (settings.backend, *settings.beside)
        found, missing = all_contenders(shape, settings.operators, backends=backends, limit=settings.limit)
        for direction, backward in DIRECTIONS.items():
            for row in _compare_at(shape, found, settings, direction, backward):
                rows.append(row)
                show(_line(row))
        torch.set_num_threads(own_threads)
    return rows, missing


def _compare_at(
    shape: Shape, found: dict[str, dict[str, Contender]], settings: Settings, direction: str, backward: bool
) -> list[dict[str, Any]]:
    """The rows of one point and direction."""
    contenders = {operator: found[operator][operator] for operator in found}
    for own in found.values():
        contenders |= own
    columns = ("ours_ms", "ours_spread_ms", "theirs_ms", "theirs_spread_ms")
    rows: list[dict[str, Any]] = []
    idle: dict[str, list[float]] = {}
    for loaded in (False, True) if settings.busy else (False,):
        with busy(shape.threads) if loaded else nullcontext():
            seconds = time_in_turns(contenders, settings, backward=backward)
        times = {name: [1e3 * each for each in report.median_and_spread(own)] for name, own in seconds.items()}
        times |= {f"{name} idle": idle[name] for name in found if loaded}
        for name, own in found.items():
            for rival in [*own, f"{name} idle"][1 : None if loaded else -1]:
                row = asdict(shape) | {"operator": name, "against": rival, "direction": direction, "busy": loaded}
                row |= dict(zip(columns, (*times[name], *times[rival]), strict=True))
                rows.append(row | {"ratio": row["theirs_ms"] / row["ours_ms"]})
        idle = times
    return rows


def describe(point: dict[str, Any]) -> str:
    """A point of the sweep, or a row, without its number of tokens."""
    widths = f"K={point['key_width']} V={point['value_width']}"
    return f"B={point['batch']} H={point['heads']} {widths} {point['dtype']}, threads {point['threads']}"


def _line(row: dict[str, Any]) -> str:
    times = [f"{row[f'{whose}_ms']:9.1f} ± {row[f'{whose}_spread_ms']:6.1f}" for whose in ("ours", "theirs")]
    against = f" {row['against']}{', both busy' if row['busy'] else ''}"
    return TABLE.row(row["tokens"], row["direction"], row["operator"], *times, row["ratio"], against)


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Time against length, both on logarithmic scales, one panel per direction."""
    figure = report.new_figure(13, 5.5)
    panels = figure.subplots(1, 2, sharey=True)
    own = {row["operator"] for row in rows}
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        curves: dict[str, dict[int, float]] = {}
        for row in (row for row in rows if row["direction"] == direction):
            curves.setdefault(row["operator"], {})[row["tokens"]] = row["ours_ms"]
            curves.setdefault(row["against"], {})[row["tokens"]] = row["theirs_ms"]
        for name, points in curves.items():
            panel.plot(list(points), list(points.values()), "-o" if name in own else "--s", label=name, markersize=4)
        panel.set(yscale="log", xlabel="tokens", title=direction)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds, median")
    panels[1].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    report.save_figure(figure, path)


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    packages = ("transformers", "flash-linear-attention", "flash-attn")
    about = report.machine(settings.device) | {package: report.version(package) for package in packages}
    sources = {dtype: limit_source(getattr(torch, dtype)) for dtype in settings.dtype} if settings.limit else {}
    print(report.in_a_line(about))
    print(f"tensor attention K={settings.tensor_key_width}, window {settings.window}; ± is half the quartile distance")
    for dtype, source in sources.items():
        print(f"gemm_limit of {dtype} by {source}")
    rows, missing = compare(settings, lambda line: print(line, flush=True))
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}")
    folder = Path(settings.output_dir)
    paths = [folder / "bench_operators.json"]
    report.write_results(paths[0], settings, about=about, limit=sources, skipped=missing, rows=rows)
    # One picture for each point of the sweep, numbered where there are several.
    points: dict[str, list[dict]] = {}
    for row in rows:
        if not row["busy"]:
            points.setdefault(describe(row), []).append(row)
    for number, (where, chosen) in enumerate(points.items(), 1):
        paths.append(folder / f"bench_operators{f'_{number}' if len(points) > 1 else ''}.png")
        draw(chosen, f"{report.in_a_line(about)}; {where}", paths[-1])
    print("\n" + ", ".join(map(str, paths)))
    return 0
