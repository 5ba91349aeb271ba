"""Predicts how long the kernels of linear attention and the delta rule take on an H100: nothing here is measured.

    python tools/predict_kernels.py                          # 16 heads; the model's error, then predictions
    python tools/predict_kernels.py heads=[4,16] tokens=[8192,131072]
    python tools/predict_kernels.py output_dir=outputs/predicted

A launch takes what its kind takes the most of:

    one program a chunk    bytes over HBM's rate, plus FLOPs of products over the matrix units' rate, each over a share
                           of it that is reached
    chunk after chunk      rounds of programs * chunks of a program * time of a step; a step is so long for itself, for
                           each of its products, which wait for each other, and for exponentials of decays per token

Bytes and FLOPs are counted by the kernels' own arithmetic (the interpreter counts the same, tests/kernels/inspect),
rounds follow from programs, multiprocessors, and the blocks that fit on one (read off the machine code). The five
numbers left are fitted, by least squares of relative errors, to times measured on an H100 at the lengths in
`CALIBRATION`; the other lengths, and another library's kernels on another GPU, are held out.

What no measurement says yet: whether blocks that share a multiprocessor hide each other's waiting. Predictions for rows
that are cut are given for both ends, all of it and none. bfloat16, keys and values 128 wide, chunks of 64 tokens.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain import report
from seqtrain.config import read_settings

CHUNK, WIDTH, WORD = 64, 128, 2
LAUNCH = 4e-6


@dataclass(frozen=True)
class Gpu:
    """Bytes of HBM and dense bfloat16 FLOPs a second; multiprocessors. Source: NVIDIA's data sheets."""

    bandwidth: float
    flops: float
    multiprocessors: int


H100, H200 = Gpu(3.35e12, 989e12, 132), Gpu(4.8e12, 989e12, 132)


@dataclass(frozen=True)
class Form:
    """A form of the recurrence; decay: 0 none, 1 per token, 2 per channel."""

    delta: bool
    decay: int


FORMS = {
    "delta rule, decay per token": Form(True, 1),
    "delta rule, decay per channel": Form(True, 2),
    "linear attention, decay per token": Form(False, 1),
    "linear attention, decay per channel": Form(False, 2),
}


@dataclass(frozen=True)
class Launch:
    """Bytes and FLOPs per token and head. Of a kernel that goes from chunk to chunk: `products` of a step, `programs`
    in all, `steps` of one, and `resident` blocks on a multiprocessor; steps of others are 0."""

    kernel: str
    bytes: float
    flops: float = 0.0
    products: int = 0
    programs: int = 0
    steps: int = 0
    resident: int = 1
    decays: bool = False


@dataclass(frozen=True)
class Cut:
    """A row in pieces of so many chunks; see `matrix_launches.piece_chunks`."""

    chunks: int
    pieces: int


# Blocks of V of a row, and of a piece; blocks that fit on a multiprocessor, as compiled for sm_90: `forward` that
# writes outputs, or states alone; `reverse`; `maps` of states, or of gradients, too.
WHOLE_WIDTH, CUT_WIDTH = 16, 32
RESIDENT = {"forward": 2, "states": 3, "reverse": 2, "maps": 3, "both maps": 2}


def forward(form: Form, chunks: int, heads: int, cut: Cut | None = None) -> list[Launch]:
    """What a forward pass launches, of one row."""
    row, pairs = WIDTH * WORD, CHUNK * WORD
    found = []
    if form.delta or form.decay == 2:
        found.append(_prepare(form, known=False))
    if cut:
        found += _maps(form, heads, cut, both=False)
    bytes_moved = 4 * row + _decay_bytes(form) + (pairs if form.decay == 2 else 0)
    products = (4 if form.decay < 2 else 3) + 2 * form.delta
    flops = 4 * WIDTH * WIDTH + 2 * CHUNK * WIDTH * (products - 2 - form.delta) + 2 * WIDTH * WIDTH * form.delta
    found.append(_sequential("forward", form, bytes_moved, flops, products, chunks, heads, cut))
    return found


def backward(form: Form, chunks: int, heads: int, cut: Cut | None = None) -> list[Launch]:
    """What a backward pass launches, of one row."""
    row, pairs, state = WIDTH * WORD, CHUNK * WORD, WIDTH * WIDTH * WORD / CHUNK
    decays, given = _decay_bytes(form), pairs if form.decay == 2 else 0
    found = [_prepare(form, known=True)] if form.decay == 2 else []
    if cut:
        found += _maps(form, heads, cut, both=True)
    states = (2 + form.delta) * row + decays + state
    flops = 2 * WIDTH * WIDTH * (1 + form.delta) + 2 * CHUNK * WIDTH * form.delta
    found.append(_sequential("states", form, states, flops, 3 if form.delta else 1, chunks, heads, cut))
    back = 4 * row + decays + given + state
    products = (4 if form.decay < 2 else 3) + 2 * form.delta
    flops = 2 * WIDTH * WIDTH * (2 + form.delta) + 2 * CHUNK * WIDTH * (products - 2 - form.delta)
    found.append(_sequential("reverse", form, back, flops, products, chunks, heads, cut))
    channel = 4 * WIDTH if form.decay == 2 else 0
    read = (4 + form.delta) * row + 2 * state + (2 if form.delta else 0) + (8 if form.decay == 1 else channel)
    written = 2 * row + (2 if form.delta else 0) + (4 if form.decay == 1 else channel)
    flops = 2 * WIDTH * WIDTH * (2 + form.delta) + 2 * CHUNK * WIDTH * (3 + 3 * form.delta)
    found.append(Launch("gradients", read + written, flops))
    return found


def _decay_bytes(form: Form) -> float:
    """What kernels that go from chunk to chunk read besides rows: sums, or `asked` and factors; beta, inverse."""
    scalar = {0: 0.0, 1: 8.0 if form.delta else 12.0, 2: 4 * WIDTH / CHUNK}[form.decay]
    asked = WIDTH * WORD if form.delta and form.decay == 2 else 0
    return scalar + asked + (2 + CHUNK * WORD if form.delta else 0)


def _prepare(form: Form, *, known: bool) -> Launch:
    row, pairs = WIDTH * WORD, CHUNK * WORD
    inverse = pairs + 2 if form.delta and not known else 0
    if form.decay < 2:
        return Launch("prepare", row + inverse + (12 if form.decay else 0), 2 * CHUNK * WIDTH + _INVERSE)
    rows = (4 + form.delta) * row + 4 * WIDTH + 4 * WIDTH / CHUNK
    flops = 2 * CHUNK * WIDTH * (1 + form.delta) + (_INVERSE if inverse else 0)
    return Launch("prepare", rows + pairs + inverse, flops)


# Two merges of two products of chunks by chunks, three times over for float32's precision; per token.
_INVERSE = 4 * 2 * CHUNK * CHUNK * 3


def _sequential(
    kernel: str, form: Form, bytes_moved: float, flops: float, products: int, chunks: int, heads: int, cut: Cut | None
) -> Launch:
    blocks = WIDTH // (CUT_WIDTH if cut else WHOLE_WIDTH)
    return Launch(
        kernel,
        bytes_moved,
        flops,
        products,
        programs=heads * blocks * (cut.pieces if cut else 1),
        steps=cut.chunks if cut else chunks,
        resident=RESIDENT[kernel] if cut else 1,
        decays=form.decay == 1,
    )


def _maps(form: Form, heads: int, cut: Cut, *, both: bool) -> list[Launch]:
    blocks, row = WIDTH // CUT_WIDTH, WIDTH * WORD
    # Of the pieces but one: nobody asks for the last one's update, or the first one's gradient.
    asked = (cut.pieces - 1) * blocks * (1 + form.delta + both) + (blocks if both and form.delta else 0)
    share = (cut.pieces - 1) / cut.pieces
    columns = 2 if form.delta else 1
    flops = columns * (2 * WIDTH * WIDTH * (1 + form.delta) + 2 * CHUNK * WIDTH * form.delta)
    bytes_moved = 2 * row + _decay_bytes(form)
    products = 3 if form.delta else 1
    if both:
        flops += 2 * WIDTH * WIDTH * (1 + 2 * form.delta) + 2 * CHUNK * WIDTH * 3 * form.delta
        bytes_moved += 2 * row
    maps = Launch(
        "maps",
        bytes_moved * share,
        flops * share,
        products,
        programs=heads * asked,
        steps=cut.chunks,
        resident=RESIDENT["both maps" if both else "maps"],
        decays=form.decay == 1,
    )
    programs = heads * (WIDTH // 16) * (1 + both)
    return [maps, Launch("carry", 0, 0, 2 if form.delta else 0, programs, cut.pieces, resident=2)]


@dataclass(frozen=True)
class Model:
    """The fitted numbers: how many times the data sheet's time bytes and FLOPs take (1 or more), and seconds of a step,
    of each product in it, and of its exponentials."""

    bytes: float
    flops: float
    step: float
    product: float
    decays: float

    def seconds(self, launches: Iterable[Launch], tokens: int, heads: int, gpu: Gpu, *, hidden: bool = True) -> float:
        """hidden: blocks that share a multiprocessor hide each other's waiting."""
        return sum(self._launch(launch, tokens * heads, gpu, hidden) for launch in launches)

    def _launch(self, launch: Launch, rows: int, gpu: Gpu, hidden: bool) -> float:
        moved = rows * launch.bytes / gpu.bandwidth * self.bytes
        products = rows * launch.flops / gpu.flops * self.flops
        if not launch.steps:
            return LAUNCH + moved + products
        steps = _steps(launch, gpu, hidden=hidden)
        step = self.step + launch.products * self.product + launch.decays * self.decays
        return LAUNCH + max(steps * step, moved, products)


def _steps(launch: Launch, gpu: Gpu, *, hidden: bool) -> float:
    """Steps that follow each other. Programs are handed out as others end, so that rounds need not be whole."""
    at_a_time = gpu.multiprocessors * (launch.resident if hidden else 1)
    return launch.steps * max(1.0, launch.programs / at_a_time)


@dataclass(frozen=True)
class Measured:
    """A time in seconds, forward or backward, of one row with so many heads."""

    name: str
    tokens: int
    heads: int
    direction: str
    seconds: float
    gpu: Gpu = H100

    @property
    def launches(self) -> list[Launch]:
        if self.name == PEER:
            return _peer(self.tokens // CHUNK, self.heads, self.direction)
        find = forward if self.direction == "forward" else backward
        return find(FORMS[self.name], self.tokens // CHUNK, self.heads)


def _ours() -> Iterator[Measured]:
    """docs/performance.md, "Operators on an H100", ms: forward, and forward + backward; no row of these was cut.

    Of 8,192 tokens what kernels took by themselves: the table's own numbers are Python's."""
    table = {
        32768: ((2.2, 5.2), (1.9, 6.7), (1.1, 3.6), (1.2, 4.3)),
        65536: ((3.9, 9.7), (3.4, 12.8), (2.0, 6.6), (2.0, 8.1)),
    }
    rows = [(name, tokens, *times) for tokens, each in table.items() for name, times in zip(FORMS, each, strict=True)]
    rows.append(("delta rule, decay per token", 8192, 0.46, 1.23))
    for name, tokens, first, both in rows:
        yield Measured(name, tokens, 16, "forward", first * 1e-3)
        yield Measured(name, tokens, 16, "backward", (both - first) * 1e-3)


PEER = "flash-linear-attention 0.5.1, gated delta rule"


def _peers() -> Iterator[Measured]:
    """FlashQLA's benchmark_results_H200.txt, ms, forward and backward by CUDA graphs."""
    for tokens, first, second in ((8192, 0.316, 0.957), (32768, 1.241, 3.701)):
        yield Measured(PEER, tokens, 16, "forward", first * 1e-3, H200)
        yield Measured(PEER, tokens, 16, "backward", second * 1e-3, H200)


def _peer(chunks: int, heads: int, direction: str) -> list[Launch]:
    """What that library launches: bytes as counted in the interpreter, one or two kernels from chunk to chunk."""
    state, row = WIDTH * WIDTH * WORD / CHUNK, WIDTH * WORD
    flops = 4 * WIDTH * WIDTH
    states = Launch("states", 4 * row + state, flops, 2, 2 * heads, chunks, decays=True)
    if direction == "forward":
        parallel = 4716 - states.bytes
        return [states, *(Launch("parallel", parallel / 4, 2 * flops / 4) for _ in range(4))]
    reverse = Launch("reverse", 6 * row + state, 1.5 * flops, 3, 2 * heads, chunks, decays=True)
    parallel = 11586 - states.bytes - reverse.bytes
    return [states, reverse, *(Launch("parallel", parallel / 5, 4 * flops / 5) for _ in range(5))]


MEASURED = (*_ours(), *_peers())
# The lengths whose measurements of ours the model is fitted to.
CALIBRATION = (8192, 32768)


def is_held_out(point: Measured) -> bool:
    return point.name == PEER or point.tokens not in CALIBRATION


def fit(points: Sequence[Measured]) -> Model:
    """The model whose relative errors have the least sum of squares; its numbers are at least 0, shares at most 1."""
    rows, targets = [], []
    for point in points:
        count, gpu = point.tokens * point.heads, point.gpu
        launches = point.launches
        parallel = [x for x in launches if not x.steps]
        sequential = [(x, _steps(x, gpu, hidden=True)) for x in launches if x.steps]
        rows.append(
            [
                count * sum(x.bytes for x in parallel) / gpu.bandwidth,
                count * sum(x.flops for x in parallel) / gpu.flops,
                sum(steps for _, steps in sequential),
                sum(steps * x.products for x, steps in sequential),
                sum(steps * x.decays for x, steps in sequential),
            ]
        )
        targets.append(point.seconds - LAUNCH * len(launches))
    scale = np.array([point.seconds for point in points])
    features, wanted = np.array(rows) / scale[:, None], np.array(targets) / scale
    # At most the rates of the data sheet: the fit is of what comes on top.
    least = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    return Model(*map(float, least + _nonnegative(features, wanted - features @ least)))


def _nonnegative(features: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with coefficients of at least 0: the best of all choices of those that are not 0."""
    best, error = np.zeros(features.shape[1]), float(np.square(wanted).sum())
    for count in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), count):
            found = np.linalg.lstsq(features[:, chosen], wanted, rcond=None)[0]
            left = float(np.square(features[:, chosen] @ found - wanted).sum())
            if (found >= 0).all() and left < error:
                best, error = np.zeros(features.shape[1]), left
                best[list(chosen)] = found
    return best


def errors(model: Model, points: Iterable[Measured]) -> dict[Measured, float]:
    """Predicted over measured, less 1."""
    return {x: model.seconds(x.launches, x.tokens, x.heads, x.gpu) / x.seconds - 1 for x in points}


@dataclass(frozen=True)
class Prediction:
    """Seconds of a forward and a backward pass on an H100; `cut` where the row is: at best, and with nothing hidden."""

    name: str
    tokens: int
    heads: int
    chunks_per_piece: int
    whole: float
    cut: float
    cut_at_worst: float


def predict(model: Model, name: str, tokens: int, heads: int) -> Prediction:
    """Of a row left whole, and cut as on an H100; without a cut, all three are the same."""
    # Not above: Triton is no dependency of the package.
    from seqtrain.kernels.triton.matrix_launches import piece_chunks

    form, chunks = FORMS[name], -(-tokens // CHUNK)
    widths = (heads * WIDTH // WHOLE_WIDTH, heads * WIDTH // CUT_WIDTH)
    length = piece_chunks([chunks], *widths, H100.multiprocessors, delta=form.delta)

    def seconds(cut: Cut | None, *, hidden: bool) -> float:
        launches = forward(form, chunks, heads, cut) + backward(form, chunks, heads, cut)
        return model.seconds(launches, tokens, heads, H100, hidden=hidden)

    cut = Cut(length, -(-chunks // length)) if length else None
    whole = seconds(None, hidden=True)
    times = [seconds(cut, hidden=hidden) if cut else whole for hidden in (True, False)]
    return Prediction(name, tokens, heads, length, whole, *times)


@dataclass(frozen=True)
class Settings:
    # Tokens of a row, each a multiple of 64.
    tokens: Annotated[list[Annotated[int, Field(ge=64, multiple_of=64)]], Field(min_length=1)] = field(
        default_factory=lambda: [8192, 32768, 131072]
    )
    # Heads, all of width 128.
    heads: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = field(default_factory=lambda: [16])
    # Folder for the results.
    output_dir: str = "outputs/predict_kernels"


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    model = fit([x for x in MEASURED if not is_held_out(x)])
    found = errors(model, MEASURED)
    print(f"{'':48} {'tokens':>7} {'':9} {'measured':>9} {'model':>7} {'error':>6}")
    for held in (False, True):
        print("held out" if held else "fitted to")
        for x in (x for x in MEASURED if is_held_out(x) == held):
            times = f"{x.seconds * 1e3:9.2f} {(1 + found[x]) * x.seconds * 1e3:7.2f} {found[x]:+6.0%}"
            print(f"  {x.name:46} {x.tokens:7,} {x.direction:9} {times}")
        sizes = [abs(found[x]) for x in MEASURED if is_held_out(x) == held]
        print(f"  mean error {np.mean(sizes):.0%}, largest {max(sizes):.0%}")
    predictions = [
        predict(model, name, tokens, heads) for name in FORMS for tokens in settings.tokens for heads in settings.heads
    ]
    print("\npredicted for an H100, never measured: ms, forward + backward")
    print(f"{'':38} {'tokens':>7} {'heads':>5} {'whole':>6} {'pieces of':>9} {'cut, best':>9} {'worst':>6}")
    for each in predictions:
        cut = f"{each.chunks_per_piece * CHUNK:9,} {each.cut * 1e3:9.2f} {each.cut_at_worst * 1e3:6.2f}"
        sizes_of = f"{each.tokens:7,} {each.heads:5} {each.whole * 1e3:6.2f}"
        print(f"  {each.name:36} {sizes_of} {cut if each.chunks_per_piece else '     none'}")
    path = Path(settings.output_dir) / "predict_kernels.json"
    rows = [{**asdict(x), "gpu": None, "error": error, "held_out": is_held_out(x)} for x, error in found.items()]
    found_times = list(map(asdict, predictions))
    report.write_results(path, settings, model=asdict(model), errors=rows, predictions=found_times)
    print(path)
    return 0
