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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BeforeValidator, Field

from seqtrain.benchmarks.contenders import Contender, Shape, limit, make_inputs, ours, rivals, sdpa
from seqtrain.benchmarks.gemm_limit import limit_source
from seqtrain.benchmarks.live_table import LiveTable
from seqtrain.config import read_settings
from seqtrain.profiling import spread
from seqtrain.report import machine, new_figure, save_figure, version, write_json

Operator = Literal[
    "delta_rule", "scalar_decay", "channel_decay", "kda", "diagonal_scan", "tensor_attention", "sliding_attention"
]
Dtype = Literal["float32", "bfloat16"]
Size = Annotated[int, Field(gt=0)]
# A list, for which its only entry may stand.
LISTED = (Field(min_length=1), BeforeValidator(lambda values: values if isinstance(values, list) else [values]))
Sizes = Annotated[list[Size], *LISTED]
Counts = Annotated[list[Annotated[int, Field(ge=0)]], *LISTED]
Dtypes = Annotated[list[Dtype], *LISTED]
DIRECTIONS = {"forward": False, "forward+backward": True}
TABLE = LiveTable(
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
    tokens: Sizes = field(default_factory=lambda: [1024, 2048, 4096, 8192, 16384, 32768])
    # Sequences in a batch.
    batch: Sizes = field(default_factory=lambda: [1])
    # Heads, and the width of keys and values of each; the diagonal scan has heads * value_width channels.
    heads: Sizes = field(default_factory=lambda: [8])
    key_width: Sizes = field(default_factory=lambda: [64])
    # 0: as wide as the keys.
    value_width: Counts = field(default_factory=lambda: [64])
    # Key width of tensor attention, whose features grow with its square; the mixer has 4 unless told otherwise.
    tensor_key_width: Size = 4
    # Keys that a query of the sliding attention sees.
    window: Size = 512
    operators: list[Operator] = field(default_factory=lambda: list(get_args(Operator)))
    # Our backend: auto, chunked, reference, ...
    backend: str = "auto"
    # Our other backends to time as well, such as [chunked].
    beside: list[Literal["chunked", "native", "triton"]] = field(default_factory=list)
    dtype: Dtypes = field(default_factory=lambda: ["float32"])
    device: str = "cpu"
    # CPU threads; 0 leaves PyTorch's own number.
    threads: Counts = field(default_factory=lambda: [0])
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
    swept = (settings.batch, settings.heads, settings.key_width, settings.value_width, settings.dtype, settings.threads)
    for (batch, heads, key, value, dtype, threads), tokens in itertools.product(
        itertools.product(*swept), settings.tokens
    ):
        yield Shape(
            tokens=tokens,
            batch=batch,
            heads=heads,
            key_width=key,
            value_width=value or key,
            tensor_key_width=settings.tensor_key_width,
            window=settings.window,
            dtype=dtype,
            device=settings.device,
            threads=threads or torch.get_num_threads(),
        )


def time_in_turns(contenders: Sequence[Contender], settings: Settings, *, backward: bool) -> dict[str, list[float]]:
    """Seconds of each contender's runs: one untimed round, then rounds in which each runs once."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(settings.rounds + 1):
        for contender in contenders:
            spent = times[contender.name]
            if sum(spent) > settings.seconds:
                continue
            start = _now(settings.device)
            (contender.both if backward else contender.forward)()
            if turn:
                spent.append(_now(settings.device) - start)
    return times


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
        found, missing = _compare_at(shape, settings)
        for row in found:
            rows.append(row)
            show(_line(row))
        torch.set_num_threads(own_threads)
    return rows, missing


def _compare_at(shape: Shape, settings: Settings) -> tuple[list[dict], dict[str, str]]:
    inputs = make_inputs(shape)
    theirs, missing = rivals(shape, inputs, settings.operators)
    attention = sdpa(inputs)
    own = {name: ours(shape, inputs, name, settings.backend) for name in settings.operators}
    against = {
        name: [
            *(limit(shape, name) if settings.limit else []),
            *theirs[name],
            *(ours(shape, inputs, name, backend, f" {backend}") for backend in settings.beside),
            attention,
        ]
        for name in own
    }
    contenders = {each.name: each for each in (*own.values(), *itertools.chain.from_iterable(against.values()))}
    rows = []
    for direction, backward in DIRECTIONS.items():
        idle: dict[str, tuple[float, float]] = {}
        for loaded in (False, True) if settings.busy else (False,):
            with busy(shape.threads) if loaded else nullcontext():
                times = time_in_turns(list(contenders.values()), settings, backward=backward)
            found = {name: _milliseconds(seconds) for name, seconds in times.items()}
            found |= {f"{name} idle": idle[name] for name in own if loaded}
            for name in own:
                compared = [each.name for each in against[name]] + ([f"{name} idle"] if loaded else [])
                rows += [_row(shape, direction, loaded, name, rival, found) for rival in compared]
            idle = found
    return rows, missing


def _milliseconds(seconds: list[float]) -> tuple[float, float]:
    """Median and half the distance between the quartiles."""
    found = spread(seconds)
    return 1e3 * found["median"], 1e3 * (found["high"] - found["low"]) / 2


def _row(
    shape: Shape, direction: str, loaded: bool, name: str, rival: str, times: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    (own, own_spread), (theirs, their_spread) = times[name], times[rival]
    return {
        **asdict(shape),
        "operator": name,
        "against": rival,
        "direction": direction,
        "busy": loaded,
        "ours_ms": own,
        "ours_spread_ms": own_spread,
        "theirs_ms": theirs,
        "theirs_spread_ms": their_spread,
        "ratio": theirs / own,
    }


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
    figure = new_figure(13, 5.5)
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
    save_figure(figure, path)


def _pictures(rows: list[dict], title: str, folder: Path) -> list[Path]:
    """One for each point of the sweep, numbered where there are several."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if not row["busy"]:
            groups.setdefault(describe(row), []).append(row)
    paths = []
    for number, (where, chosen) in enumerate(groups.items(), 1):
        paths.append(folder / f"bench_operators{f'_{number}' if len(groups) > 1 else ''}.png")
        draw(chosen, f"{title}; {where}", paths[-1])
    return paths


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    about = machine(settings.device)
    about |= {package: version(package) for package in ("transformers", "flash-linear-attention", "flash-attn")}
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    sources = {dtype: limit_source(getattr(torch, dtype)) for dtype in settings.dtype} if settings.limit else {}
    print(title)
    print(f"tensor attention K={settings.tensor_key_width}, window {settings.window}; ± is half the quartile distance")
    for dtype, source in sources.items():
        print(f"gemm_limit of {dtype} by {source}")
    rows, missing = compare(settings, lambda line: print(line, flush=True))
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}")
    report = Path(settings.output_dir) / "bench_operators.json"
    content = {"machine": about, "settings": asdict(settings), "limit": sources, "skipped": missing, "rows": rows}
    write_json(report, content)
    print("\n" + ", ".join(str(path) for path in (report, *_pictures(rows, title, report.parent))))
    return 0
