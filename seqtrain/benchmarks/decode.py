"""Times decoding, token by token, beside transformers and beside reading the weights, in turns, in one process.

    python tools/bench_decode.py                                  # a hybrid of 8 layers, batches of 1 and 16
    python tools/bench_decode.py 'batch=[1]' 'context=[512,8192]' 'weights=[float32,int8,int4]'
    python tools/bench_decode.py threads=2 rounds=30

The model is one of `tools/bench_training.py`, made by transformers and read by `seqtrain.models.from_pretrained`. Both
read a prompt of `context` random tokens, and go on with the same tokens, one for each row and step. A round takes one
step of each side and reads once, in this process and by as many threads, as many bytes as the weights have that a step
needs: all but the embedding, of which it needs rows, unless it is the head, too. Medians are printed: the step's CPU
time, since others may keep the cores busy, and wall time; `of limit` is our CPU time over the reading's, `tokens/s`
those of all rows by CPU time of as many threads. A table and `bench_decode.json` are left in `output_dir`.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain import report
from seqtrain.benchmarks.training import FAMILIES, LISTED, OURS, THEIRS
from seqtrain.benchmarks.training import Settings as Sizes
from seqtrain.benchmarks.training import both as both_models
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.kernels.native.build import library, unavailable
from seqtrain.models import decoding
from seqtrain.models.quantized import integers_of, is_quantized, quantize

READING = "reading"
# Steps of each side before it is timed: the first one is recorded.
FIRST = 2
TABLE = report.LiveTable(
    {
        "weights": "<8",
        "batch": "5,d",
        "context": "8,d",
        "CPU ms": "8.2f",
        "wall ms": "8.2f",
        "limit ms": "8.2f",
        "of limit": "8.2f",
        "HF CPU ms": "9.2f",
        "ratio": "6.2f",
        "tokens/s": "9,.0f",
    }
)


@dataclass(frozen=True)
class Settings:
    # The model: a family of tools/bench_training.py.
    family: str = "qwen3_next"
    # Rows that are decoded together.
    batch: Annotated[tuple[Annotated[int, Field(gt=0)], ...], *LISTED] = (1, 16)
    # Tokens before the first one that is timed.
    context: Annotated[tuple[Annotated[int, Field(gt=0)], ...], *LISTED] = (512,)
    # What our matrices are read as.
    weights: Annotated[tuple[Literal["float32", "int8", "int4"], ...], *LISTED] = ("float32", "int8")
    # Channels of the residual stream.
    width: Annotated[int, Field(gt=0)] = 512
    # Layers.
    depth: Annotated[int, Field(gt=0)] = 8
    # Rows of embedding and head.
    vocab: Annotated[int, Field(gt=0)] = 16384
    # Threads of both; 0: as many as there are cores.
    threads: Annotated[int, Field(ge=0)] = 1
    # Times each side takes a step, in turns.
    rounds: Annotated[int, Field(gt=0)] = 20
    output_dir: str = "outputs/bench_decode"


@dataclass(frozen=True)
class Taken:
    """Seconds of a step."""

    cpu: float
    wall: float


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if settings.family not in FAMILIES:
        raise ConfigError("family: " + unknown_name("family", settings.family, FAMILIES))
    if (reason := unavailable()) is not None:
        raise ConfigError(f"bench_decode: the native library {reason}")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    about = report.machine() | {"transformers": transformers.__version__}
    print(report.in_a_line(about), flush=True)
    print(TABLE.header, flush=True)
    longest = max(settings.context) + FIRST + settings.rounds
    sizes = Sizes(tokens=(longest,), width=settings.width, depth=settings.depth, vocab=settings.vocab)
    rows: list[dict[str, Any]] = []
    for weights in settings.weights:
        ours, theirs = both_models(settings.family, sizes)
        ours.eval(), theirs.eval()
        quantize(ours, weights)
        for batch in settings.batch:
            for context in settings.context:
                rows.append(compared(ours, theirs, weights, batch, context, settings))
                print(line(rows[-1]), flush=True)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_results(folder / "bench_decode.json", settings, about=about, rows=rows)
    print(f"\n{folder / 'bench_decode.json'}")
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    ours, theirs, limit = (row["sides"].get(side) for side in (OURS, THEIRS, READING))
    them = (1e3 * theirs["cpu"], theirs["cpu"] / ours["cpu"]) if theirs else (None, None)
    own = 1e3 * ours["cpu"], 1e3 * ours["wall"], 1e3 * limit["cpu"], ours["cpu"] / limit["cpu"]
    return TABLE.row(row["weights"], row["batch"], row["context"], *own, *them, row["tokens_per_second"])


@torch.no_grad()
def compared(ours: Any, theirs: Any, weights: str, batch: int, context: int, settings: Settings) -> dict[str, Any]:
    """Steps of both sides, and readings, in turns; transformers' only beside float32, which it multiplies by."""
    count = FIRST + settings.rounds
    tokens = torch.randint(settings.vocab, (batch, context + count), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[Tensor], Tensor | None]] = {OURS: _our_step(ours, tokens[:, :context])}
    if weights == "float32":
        steps[THEIRS] = _their_step(theirs, tokens[:, :context])
    steps[READING] = _reading(weight_bytes(ours))
    taken: dict[str, list[Taken]] = {side: [] for side in steps}
    for index in range(count):
        token = tokens[:, context + index]
        logits = {}
        for side, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            logits[side] = step(token)
            found = Taken(time.process_time() - cpu, time.perf_counter() - wall)
            if index >= FIRST:
                taken[side].append(found)
        if THEIRS in steps:
            error = (logits[OURS] - logits[THEIRS]).abs().max()  # type: ignore[operator]
            assert error < 1e-2, f"the two sides' logits differ by {error}"
    medians = {
        side: {name: statistics.median(getattr(each, name) for each in found) for name in ("cpu", "wall")}
        for side, found in taken.items()
    }
    threads = torch.get_num_threads()
    return {
        "weights": weights,
        "batch": batch,
        "context": context,
        "bytes": weight_bytes(ours),
        "sides": medians,
        "rounds": {side: [each.cpu for each in found] for side, found in taken.items()},
        "tokens_per_second": batch * threads / medians[OURS]["cpu"],
        "planned": all(plan is not None for plan in decoding.plans_of(ours)),
    }


def weight_bytes(model: Any) -> int:
    """Of what a step reads whole."""
    tied = model.embedding.weight is model.head.weight
    found = 0
    for weight in model.parameters():
        if is_quantized(weight):
            numbers, scale, _ = integers_of(weight)
            found += numbers.nbytes + scale.nbytes
        elif weight is not model.embedding.weight or tied:
            found += weight.nbytes
    return found


def _our_step(model: Any, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    _, state = model(prompt)

    def step(token: Tensor) -> Tensor:
        nonlocal state
        logits, state = model.step(token, state)
        return logits

    return step


def _their_step(model: Any, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step(token: Tensor) -> Tensor:
        return model(token[:, None], past_key_values=cache, use_cache=True).logits[:, 0]

    return step


def _reading(count: int) -> Callable[[Tensor], None]:
    """Reads so many bytes, in vectors of floats that are summed."""
    floats, threads = torch.zeros(count // 4), torch.get_num_threads()
    read = library().seqtrain_read
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_float

    def step(token: Tensor) -> None:
        read(floats.data_ptr(), len(floats), threads)

    return step
