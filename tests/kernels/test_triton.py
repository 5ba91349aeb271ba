"""Triton kernels: widths, decays, pieces, launches. With TRITON_INTERPRET=1 they are interpreted, held to the algebra,
memory that was never written is NaN, and races are found; where there is a GPU they run on it as compiled.
"""

import itertools
import math
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from seqtrain.kernels import OPERATORS, delta_rule, dispatch, gated_norm, gpu, linear_attention, linear_cross_entropy
from seqtrain.kernels.linear_attention import LinearAttentionSegment
from seqtrain.kernels.segments import by_segment
from seqtrain.kernels.triton import recurrence as recurrence_launches
from seqtrain.kernels.triton import segment
from seqtrain.kernels.triton.matrix_launches import piece_chunks
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import (
    TOLERANCES,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)
from tests.conftest import INTERPRETED
from tests.kernels import contract_cases as contract
from tests.kernels.contract_cases import GPU, Case
from tests.models.test_compile import assert_same, build
from tests.tiers import half

if INTERPRETED:
    from seqtrain.kernels.inspect.examples import count_example
    from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, nan_filled_empty, recording

pytestmark = [] if GPU else [pytest.mark.interpreter]
interpreted = pytest.mark.skipif(GPU, reason="launches are recorded in the interpreter")
on_gpu = pytest.mark.skipif(not GPU, reason="takes too long to interpret")

DEVICE = "cuda" if GPU else "cpu"
WIDE = torch.float32 if GPU else torch.float64
BF16, HALF = torch.bfloat16, torch.float16
# The interpreter's products are exact. Gradients of decays, step sizes and queries are sums of what nearly cancels.
LIMITS = TOLERANCES if GPU else {torch.float64: 1e-12, torch.float32: 5e-6, HALF: 1.5e-3, BF16: 8e-3}
LENGTHS = [66, 0, 1]
SHAPES = (None, "B T H", "B T H K")
KINDS = ["wide", "strong", "spikes", "huge", *(["zero"] if GPU else [])]
DECAYS = [(None, "mild"), *((shape, kind) for shape in SHAPES[1:] for kind in KINDS)]
# A GPU has all combinations; in the interpreter those that are left out run with --full.
chosen = itertools.product if GPU else half
BOTH = ["linear_attention", "delta_rule"]
both = pytest.mark.parametrize("name", BOTH)
every_recurrence_shape = pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])


def matrix(name, decay_shape="B T H", *, key=16, value=20, heads=1, **fields):
    shapes = {"log_decay": decay_shape} | ({"read": None, "erase": None} if name == "delta_rule" else {})
    return Case(OPERATORS[name], {}, shapes, sizes={"H": heads, "K": key, "V": value}, **{"beta": 2.0, **fields})


def recurrence(name, tokens, *, beta=1.0, **options):
    options = {"heads": 1, "key_width": 20, "value_width": 20, **options}
    return recurrence_inputs(tokens, beta=beta if name == "delta_rule" else None, **options)


def scan(shape="B T D", **fields):
    return Case(OPERATORS["diagonal_scan"], {}, {"log_a": shape}, **fields)


def norm(width, weight="V", gate="silu"):
    shapes = {"weight": weight} | ({"gate": None} if gate == "none" else {})
    options = {"eps": 1e-6, "activation": "sigmoid" if gate == "sigmoid" else "silu", "gate_first": gate == "first"}
    return Case(gated_norm, options, shapes, sizes={"V": width})


def convolution(width=4, **options):
    return Case(OPERATORS["short_convolution"], options, {} if options else {"bias": None}, sizes={"W": width})


def tensors_of(width, value, degree=2):
    return Case(OPERATORS["tensor_attention"], {"degree": degree}, sizes={"H": 2, "K": width, "V": value})


def check(case, dtype=WIDE, *, tokens=None, lengths=None, past=None):
    past = case.has_state if past is None else past
    with nullcontext() if GPU else nan_filled_empty():
        contract.check(
            case, "triton", tokens or sum(lengths), dtype, lengths=lengths, past=past, device=DEVICE, limits=LIMITS
        )


def in_pieces(monkeypatch, operator, **sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(import_module(f"seqtrain.kernels.{operator}.triton"), name, value)


# In float64 the algebra is held to launches in any order, to the middle of a chunk, and to keys that are alike.
@pytest.mark.parametrize(
    "dtype", [torch.float32, *([] if GPU else [pytest.param(WIDE, marks=pytest.mark.full)])], ids=str
)
@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
@both
def test_every_kind_of_decay(name, decay_shape, decay, dtype):
    check(matrix(name, decay_shape, decay=decay), dtype, lengths=LENGTHS)


# Blocks of K that are no whole number of them, but of narrower ones; on a GPU those of every configuration.
@pytest.mark.parametrize("widths", [(80, 40), *([(16, 16), (64, 64), (128, 128), (256, 256)] if GPU else [])], ids=str)
@pytest.mark.parametrize(("dtype", "name", "decay_shape"), chosen([BF16, HALF], BOTH, SHAPES))
def test_16_bits(name, decay_shape, widths, dtype):
    check(matrix(name, decay_shape, key=widths[0], value=widths[1], beta=1.0), dtype, lengths=LENGTHS)


# More than one block of K and of V in every kernel, the last ones cut; and states in parts, the last part cut or empty.
WIDTHS = [((72, 40), [66]), ((20, 136), [66]), ((200, 20), [34, 0, 1]), ((130, 20), [34, 0, 1])]


@pytest.mark.parametrize(("sizes", "name", "decay_shape"), chosen(WIDTHS, BOTH, SHAPES))
def test_wide_heads(name, decay_shape, sizes):
    widths, lengths = sizes
    check(matrix(name, decay_shape, key=widths[0], value=widths[1]), torch.float32, lengths=lengths)


@pytest.mark.parametrize("tokens", [2, 64, 129])
@pytest.mark.parametrize(("name", "decay_shape"), [("delta_rule", "B T H"), ("linear_attention", "B T H K")])
def test_rows_and_heads(name, decay_shape, tokens):
    check(matrix(name, decay_shape, heads=2 if tokens < 10 else 1, decay="mild"), tokens=tokens)


# Keys all but equal make float32's rounding grow at beta = 2 (2.3e-6): the algebra is held to them, float32 to a cosine
# of 0.94 between keys.
ALIKE = [(torch.float32, 3.0), *([] if GPU else [(torch.float64, 100.0)])]


@pytest.mark.parametrize(("alike", "beta", "decay_shape"), chosen(ALIKE, [2.0, 0.0], ["none", "BTH", "BTHK"]))
def test_constant_beta_and_keys_that_are_alike(beta, decay_shape, alike):
    dtype, correlation = alike
    tensors = recurrence("delta_rule", 70, decay_shape=decay_shape, correlation=correlation)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    compare(delta_rule, tensors, dtype)


def compare(operator, tensors, dtype=WIDE, **options):
    tensors = {key: None if x is None else x.to(DEVICE) for key, x in tensors.items()}
    with nullcontext() if GPU else nan_filled_empty():
        errors = compare_with_oracle(operator, tensors, backend="triton", dtype=dtype, **options)
    assert {key: f"{error:.1e}" for key, error in errors.items() if not error <= LIMITS[dtype]} == {}


# Log2 decays of a chunk's halves, about where its middle ceases to stand for boundaries: what grows from there must not
# overflow, and what does not grow must not be lost.
HALVES = [(99, 0), (0, 99), (99, 99), (150, 0), (0, 150), (120, 120)]


@pytest.mark.parametrize(("dtype", "name", "halves"), chosen([WIDE, BF16], BOTH, HALVES))
def test_decays_about_what_the_middle_of_a_chunk_bears(name, halves, dtype):
    tensors = recurrence(name, 128, decay_shape="BTHK")
    sums = torch.tensor(halves, dtype=torch.float64).repeat(2).repeat_interleave(32) * math.log(2) / 32
    # Half of the channels decay so; the others hardly, so that there is something to see.
    tensors["log_decay"][..., ::2] = -sums.view(1, 128, 1, 1)
    compare(OPERATORS[name], tensors, dtype)


@pytest.mark.parametrize(("dtype", "name", "decay_shape"), chosen([WIDE, BF16], BOTH, SHAPES))
def test_one_token_is_one_launch(name, decay_shape, dtype):
    case = matrix(name, decay_shape, key=20, value=24, heads=3)
    check(case, dtype, tokens=1)
    if INTERPRETED:
        with recording(order="shuffled") as launches:
            contract.call(case, case.tensors(1, dtype=dtype), backend="triton")
        assert [launch.kernel for launch in launches] == ["step"]
        assert_no_races(launches)


# As many programs as a GPU runs at one time and more, over many chunks: what small inputs can't show.
@on_gpu
@every_recurrence_shape
@both
def test_long_rows_and_many_programs(name, decay_shape):
    sizes = {"batch": 2, "heads": 12, "key_width": 128, "value_width": 128}
    tensors = recurrence(name, 4000, decay_shape=decay_shape, **sizes)
    rounded = {key: x if x is None else x.cuda().bfloat16().float() for key, x in tensors.items()}
    expected = run_with_gradients(OPERATORS[name], {k: x if x is None else x.double() for k, x in rounded.items()})
    narrow = {key: x if x is None or key == "initial_state" else x.bfloat16() for key, x in rounded.items()}
    came, again = (run_with_gradients(OPERATORS[name], narrow, backend="triton") for _ in range(2))
    assert all(relative_error(came[key], expected[key]) < TOLERANCES[BF16] for key in expected)
    assert all(torch.equal(came[key], again[key]) for key in came), "two runs differ: a race"


@pytest.fixture
def in_cuts(monkeypatch):
    """Documents are cut into pieces of so many chunks."""

    def cut(chunks):
        monkeypatch.setattr(recurrence_launches, "piece_chunks", lambda *arguments, **options: chunks)
        recurrence_launches._plan.cache_clear()

    yield cut
    recurrence_launches._plan.cache_clear()


# Documents of three pieces, of one, of none, and of two, the second not whole: of 64 tokens a chunk, in float32 of 16.
CUT = {WIDE: (1, [130, 0, 1, 66]), torch.float32: (2, [70, 0, 1, 40]), BF16: (1, [130, 0, 1, 66])}


@pytest.mark.parametrize(("dtype", "name", "decay_shape"), chosen([WIDE, torch.float32, BF16], BOTH, SHAPES))
def test_documents_cut_into_pieces(name, decay_shape, dtype, in_cuts):
    chunks, lengths = CUT[dtype]
    in_cuts(chunks)
    check(matrix(name, decay_shape, key=20, value=24), dtype, lengths=lengths)


# States in parts, whose transitions are, too; and more than one block of K and of V.
@pytest.mark.parametrize(
    ("name", "decay_shape", "sizes"),
    [("delta_rule", "B T H", (72, 40)), ("linear_attention", "B T H K", (72, 40)), ("delta_rule", None, (130, 20))],
)
def test_wide_heads_cut_into_pieces(name, decay_shape, sizes, in_cuts):
    in_cuts(1)
    check(matrix(name, decay_shape, key=sizes[0], value=sizes[1]), torch.float32, lengths=[34, 1])


def test_rows_are_cut_into_pieces_where_they_leave_most_of_a_gpu_idle():
    def cut(tokens, heads, rows=1, *, delta=True):
        # Blocks of 16 columns of 128, or of 32.
        return piece_chunks([tokens // 64] * rows, 8 * heads, 4 * heads, 132, delta=delta)

    assert cut(32768, 16) == 128
    assert cut(32768, 4) == 32
    # Enough programs without; too short to gain; many rows.
    assert cut(32768, 48) == cut(2048, 16) == cut(8192, 16, rows=16) == 0
    # Its maps cost less.
    assert cut(2048, 16, delta=False) == 8
    assert piece_chunks([], 1, 1, 132, delta=True) == 0


LONG = [2, 33, 130, *([5000] if GPU else [])]


@pytest.mark.parametrize(
    ("documents", "decay", "tokens"), chosen([False, True], ["wide", "strong", "spikes", "zero", "huge"], LONG)
)
def test_diagonal_scan(tokens, decay, documents):
    lengths = [0, 1, tokens // 3, 0, tokens - tokens // 3 - 1, 0] if documents else None
    check(scan(decay=decay), tokens=tokens, lengths=lengths)


@pytest.mark.parametrize("shape", ["B T D", "D"], ids=["gates", "constant"])
@pytest.mark.parametrize("complex_ones", [("x", "log_a"), ("log_a",), ("x",), ()], ids=str)
def test_complex_numbers_in_pieces(complex_ones, shape, monkeypatch):
    in_pieces(monkeypatch, "diagonal_scan", SHORTEST=16)
    check(scan(shape, complex=complex_ones), lengths=[0, 1, 20, 0, 39, 0])
    if len(complex_ones) == 2 and shape != "D":
        check(scan(shape, complex=complex_ones), torch.float32, tokens=130)


@pytest.mark.parametrize(
    ("dtype", "decay"), [(torch.float32, "strong"), (BF16, "spikes"), (BF16, "strong"), (HALF, "wide")], ids=str
)
def test_other_dtypes_in_pieces(dtype, decay, monkeypatch):
    in_pieces(monkeypatch, "diagonal_scan", SHORTEST=16)
    check(scan(decay=decay), dtype, lengths=[0, 1, 43, 0, 86, 0])


@pytest.mark.parametrize("gate", ["none", "silu", "sigmoid", "first"])
@pytest.mark.parametrize("weight", ["V", "H V"], ids=["one weight", "weight per head"])
@pytest.mark.parametrize("width", [16, 100, *([1024] if GPU else [])])
def test_gated_norm(width, weight, gate):
    for dtype in (WIDE, torch.float32, BF16, HALF) if weight == "V" else (WIDE,):
        check(norm(width, weight, gate), dtype, tokens=5)


@pytest.mark.parametrize("weight", ["V", "H V"], ids=["one weight", "weight per head"])
def test_a_program_sums_over_its_tiles(weight, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    in_pieces(monkeypatch, "gated_norm", TILE=256)  # two rows
    check(norm(100, weight), tokens=5)


@pytest.mark.parametrize("sizes", [{"K": 40, "H": 70}, {"K": 16, "H": 9}])
@pytest.mark.parametrize("dtype", [WIDE, torch.float32, BF16, HALF], ids=str)
def test_linear_swiglu(sizes, dtype):
    check(Case(OPERATORS["linear_swiglu"], {}, sizes=sizes | {"d0": 37}), dtype, tokens=1)


@interpreted
def test_what_no_backward_pass_needs_is_not_written():
    x, weight = torch.randn(5, 16), torch.randn(2, 20, 16, requires_grad=True)
    for needed, written in ((True, 3), (False, 1)):
        with recording() as launches, torch.set_grad_enabled(needed):
            OPERATORS["linear_swiglu"](x, weight, backend="triton")
        stored = sum(each.traffic[name].written for each in launches for name in ("out", "z") if name in each.traffic)
        assert stored == written * 5 * 20 * 4, launches[0].traffic


@interpreted
def test_slices_of_a_projection_are_read_in_place():
    both = torch.randn(2, 5, 2, 3 * 16)
    x, gate = (part.unflatten(2, (3, 16)) for part in both.unbind(2))
    with recording() as launches:
        out = gated_norm(x, torch.ones(16), gate, eps=1e-6, backend="triton")
    assert "x+gate" in launches[0].traffic
    torch.testing.assert_close(out, gated_norm(x, torch.ones(16), gate, eps=1e-6, backend="reference"))


@pytest.mark.parametrize("dtype", [WIDE, torch.float32, BF16, HALF], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(50, 97), (3, 9000)])
def test_linear_cross_entropy(rows, vocabulary, dtype):
    check(Case(linear_cross_entropy, {"chunk": 16}, sizes={"n": rows, "vocab": vocabulary, "D": 16}), dtype, tokens=1)


@interpreted
def test_without_gradients_logits_are_left_alone_and_large_ones_stay_finite():
    case = Case(linear_cross_entropy, {"chunk": 64})
    tensors = case.tensors(1, dtype=torch.float32)
    tensors["hidden"] *= 1e4
    with torch.no_grad(), recording() as launches:
        loss = contract.call(case, tensors, backend="triton")[0]
    assert relative_error(loss, contract.call(case, tensors, backend="reference")[0]) < 2e-6
    assert launches[0].traffic["logits"].written == 0


@pytest.mark.parametrize("lengths", [None, [0, 1, 11, 0, 19, 2, 0]], ids=["rows", "documents"])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_short_convolution(width, lengths):
    for options in ({}, {"activation": "silu"}):
        check(convolution(width, **options), tokens=33, lengths=lengths)
    check(convolution(width, activation="silu"), tokens=6)


@pytest.mark.parametrize(("dtype", "dilation"), chosen([torch.float32, BF16, HALF], [1, 3, 16]))
def test_dilated_taps_in_pieces(dilation, dtype, monkeypatch):
    in_pieces(monkeypatch, "short_convolution", SHORTEST=20)
    check(convolution(3, activation="silu", dilation=dilation), dtype, lengths=[0, 1, 23, 0, 44, 2, 0])


@pytest.mark.parametrize(
    ("case", "lengths"),
    [(tensors_of(3, 20), [0, 1, 2, 4]), (tensors_of(4, 40), None), (tensors_of(2, 8, degree=4), [0, 1, 6, 13])],
    ids=["documents", "rows", "degree 4"],
)
def test_tensor_attention(case, lengths):
    check(case, tokens=None if lengths else 20, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_tensor_attention_in_other_dtypes(dtype):
    check(tensors_of(3, 20), dtype, lengths=[0, 1, 13, 26], past=False)


# What each launches, forward and backward, with sizes that make it work in pieces.
LAUNCHES = {
    "linear_attention": (matrix("linear_attention", key=20, value=40), {}, ["forward"] * 2 + ["reverse", "gradients"]),
    "delta_rule": (
        matrix("delta_rule", "B T H K", key=20, value=40),
        {},
        ["prepare", "forward"] * 2 + ["reverse", "gradients"],
    ),
    "diagonal_scan": (scan(), {"SHORTEST": 16}, ["scan"] * 4),
    "short_convolution": (convolution(3, dilation=3), {"SHORTEST": 20}, ["forward", "backward"]),
    "gated_norm": (norm(100, "H V"), {}, ["forward", "backward"]),
    "tensor_attention": (tensors_of(3, 20), {"SEGMENT": 1000}, None),
    "linear_cross_entropy": (Case(linear_cross_entropy, {"chunk": 16}), {}, None),
    "linear_swiglu": (Case(OPERATORS["linear_swiglu"], {}), {}, ["forward", "backward"]),
}


@interpreted
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_programs_in_any_order_without_races(name, order, monkeypatch):
    case, sizes, kernels = LAUNCHES[name]
    in_pieces(monkeypatch, name, **sizes)
    with recording(order=order) as launches:
        check(case, tokens=40, lengths=[30, 7, 3] if case.has_state else None)
    assert_no_races(launches)
    assert len(launches) >= 2
    if kernels:
        assert [launch.kernel for launch in launches] == kernels


# Two launches more, forward and backward, than in `LAUNCHES`.
@interpreted
@pytest.mark.parametrize(
    ("name", "decay_shape", "order", "kernels"),
    [
        ("linear_attention", None, "reversed", "maps carry forward, maps carry forward reverse gradients"),
        ("delta_rule", "B T H", "shuffled", "prepare maps carry forward, maps carry forward reverse gradients"),
    ],
)
def test_pieces_in_any_order_without_races(name, decay_shape, order, kernels, in_cuts):
    in_cuts(2)
    case = matrix(name, decay_shape, key=20, value=40)
    with recording(order=order) as launches:
        check(case, torch.float32, lengths=[70, 0, 17])
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == kernels.replace(",", "").split()


APART = {f"{name} {shape}": matrix(name, shape) for name in ("linear_attention", "delta_rule") for shape in SHAPES}
APART |= {"scan": scan(), "convolution": convolution(activation="silu")}


@interpreted
@pytest.mark.parametrize("case", APART.values(), ids=APART)
def test_documents_do_not_see_each_other(case):
    """NaNs in the first and the last of three documents, and next to the row in memory."""
    ends = boundaries([20, 30, 14])
    tensors = {name: x for name, x in case.tensors(64, batch=1, dtype=torch.float32).items() if x is not None}
    timed = [name for name, x in tensors.items() if x.dim() > 2]
    if case.operator.name != "short_convolution":
        tensors["initial_state"] = case.state(3, packed=True).float()

    def results(tensors):
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        out, final = case.operator(**leaves, **case.options, cu_seqlens=ends, backend="triton")
        gradients = torch.autograd.grad(out.sum() + final.sum(), list(leaves.values()))
        return {"out": out, "final_state": final} | dict(zip(leaves, gradients, strict=True))

    clean = results({name: x.clone() for name, x in tensors.items()})
    poisoned = {name: between_nans(x) if name in timed else x.clone() for name, x in tensors.items()}
    for name in timed:
        poisoned[name][:, :20] = poisoned[name][:, 50:] = float("nan")
    came = results(poisoned)
    assert came["out"][:, :20].isnan().any()
    assert all(torch.equal(came[name][:, 20:50], clean[name][:, 20:50]) for name in ("out", *timed))
    assert all(torch.equal(came[name][1], clean[name][1]) for name in {"final_state", "initial_state"} & set(came))


@interpreted
def test_strided_inputs_and_values_of_another_dtype():
    tensors = recurrence("delta_rule", 20, decay_shape="BTHK")
    tensors = {key: x.to(BF16) if key in "qk" else x.float() for key, x in tensors.items()}
    strided = {key: x.transpose(0, -1).contiguous().transpose(0, -1) for key, x in tensors.items()}
    expected = run_with_gradients(delta_rule, tensors, backend="triton")
    came = run_with_gradients(delta_rule, strided, backend="triton")
    assert all(torch.equal(came[key], expected[key]) for key in expected)
    assert came["out"].dtype == came["grad v"].dtype == torch.float32
    assert came["grad q"].dtype == BF16


@interpreted
@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
def test_a_delta_rule_s_map_and_its_outputs_come_of_one_pass(decay_shape):
    tensors = recurrence("delta_rule", 70, decay_shape=decay_shape)
    state = tensors.pop("initial_state")
    with recording() as launches:
        part = delta_rule.segment(list(tensors.values()), {}, "triton")
        transition, update = part.transition()
        part.local_output()
        out = part.add_incoming(state)
    expected, final = delta_rule(**tensors, initial_state=state, backend="reference")
    assert relative_error(out, expected) < 1e-12
    assert relative_error(transition @ state + update, final) < 1e-12
    assert [launch.kernel for launch in launches] == ["prepare", "forward"]


@interpreted
def test_nothing_to_do():
    case = matrix("delta_rule")
    came = contract.run(case, case.tensors(0, batch=1), case.state(2), cu_seqlens=boundaries([0, 0]), backend="triton")
    assert came["out"].shape == (1, 0, 1, 20)
    assert torch.equal(came["state"], case.state(2))


# Bytes per token and head, forward and backward, and launches of both.
MOST = {
    "linear_attention no decay": (1100, 5200, 4),
    "linear_attention decay [B,T,H]": (1100, 5200, 4),
    "linear_attention decay [B,T,H,K]": (3000, 8500, 6),
    "delta_rule no decay": (1600, 6300, 5),
    "delta_rule decay [B,T,H]": (1600, 6300, 5),
    "delta_rule decay [B,T,H,K]": (3800, 10500, 6),
}


# The example's keys are longer than the delta rule bears: its numbers overflow, which no count depends on.
@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MOST)
def test_bytes_and_launches(name):
    counts = count_example(f"{name} K=V=128 bfloat16")
    assert all(count.floor <= count.bytes <= limit for count, limit in zip(counts, MOST[name], strict=False))
    assert sum(count.launches for count in counts) <= MOST[name][2]


in_parts = by_segment(linear_attention)


@pytest.fixture
def chunked_work(monkeypatch):
    """What needs no incoming state is done by kernels with tests of their own, and would take most of the time."""

    def local_output(self):
        self.out, _ = linear_attention(*self.tensors, backend="chunked", **self.options)

    if not GPU:
        monkeypatch.setattr(LinearAttentionSegment, "local_output", local_output)


# Every decay; dtypes; any length; more than one block of K and of V in every kernel, the last ones cut.
SEGMENTS = [
    *((70, 20, 24, shape, kind, WIDE) for shape in ("BTH", "BTHK") for kind in ("wide", "strong", "spikes")),
    *((70, 8, 5, shape, kind, torch.float32) for shape in ("BTH", "BTHK") for kind in ("strong", "spikes", "huge")),
    *((70, 32, 32, shape, "wide", dtype) for shape in ("none", "BTH", "BTHK") for dtype in (BF16, HALF)),
    *((tokens, 8, 5, shape, "mild", WIDE) for shape, tokens in (("BTH", 0), ("BTH", 32), ("BTHK", 0), ("BTHK", 33))),
    *((20, 40, 72, shape, "wide", WIDE) for shape in ("BTH", "BTHK")),
    *((tokens, 20, 24, shape, "mild", WIDE) for tokens, shape in ((70, "none"), (1, "none"), (70, "H"))),
]
if GPU:
    SEGMENTS += [
        (330, *size, shape, "wide", BF16) for size in ((128, 128), (256, 256)) for shape in ("none", "BTH", "BTHK")
    ]


@pytest.mark.parametrize(("tokens", "key", "value", "decay_shape", "decay", "dtype"), SEGMENTS)
def test_a_segment_of_linear_attention(tokens, key, value, decay_shape, decay, dtype, chunked_work):
    sizes = {"heads": 1, "batch": 2, "key_width": key, "value_width": value}
    compare(in_parts, recurrence_inputs(tokens, decay_shape=decay_shape, decay=decay, **sizes), dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, HALF], ids=str)
@pytest.mark.parametrize("width", [16, 128, 256])
@every_recurrence_shape
def test_a_segment_of_the_delta_rule(decay_shape, width, dtype):
    sizes = {"batch": 2, "heads": 2, "key_width": width, "value_width": width}
    compare(
        by_segment(delta_rule), recurrence("delta_rule", 330, decay_shape=decay_shape, decay="wide", **sizes), dtype
    )


@interpreted
@pytest.mark.parametrize(("decay_shape", "order"), [("none", "shuffled"), ("BTH", "reversed"), ("BTHK", "shuffled")])
def test_a_segment_s_programs_in_any_order_without_races(decay_shape, order, chunked_work):
    with recording(order=order) as launches:
        compare(in_parts, recurrence_inputs(40, batch=2, decay_shape=decay_shape))
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == ["gather", "spread", "gather", "weigh", "spread", "weigh"]


@interpreted
@pytest.mark.parametrize("decay_shape", ["none", "BTHK"])
def test_slabs_of_a_segment_change_nothing(decay_shape, monkeypatch, chunked_work):
    tensors = recurrence_inputs(100, heads=1, decay_shape=decay_shape)
    found = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(gpu, "PROGRAMS", programs)
        found.append(run_with_gradients(in_parts, tensors, backend="triton"))
    for key, x in found[0].items():
        torch.testing.assert_close(found[1][key], x)
        torch.testing.assert_close(found[2][key], x)


@interpreted
def test_a_segment_reads_nothing_beyond_its_tensors(chunked_work):
    tensors = {key: x.float() for key, x in recurrence_inputs(33, heads=1, decay_shape="BTHK").items()}
    clean = run_with_gradients(in_parts, tensors, backend="triton")
    state = tensors.pop("initial_state").requires_grad_()
    leaves = {key: between_nans(x).requires_grad_() for key, x in tensors.items()}
    out, final = in_parts(**leaves, initial_state=state, backend="triton")
    assert torch.equal(out, clean["out"])
    assert torch.equal(final, clean["final_state"])


@interpreted
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_a_segment_s_operators_pass_pytorch_s_own_check(decay_shape, chunked_work):
    tensors = recurrence_inputs(40, heads=1, decay_shape=decay_shape)
    q, k, v, log_decay, state = (None if x is None else x.requires_grad_() for x in tensors.values())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(segment._find_map.op, (k, v, log_decay), test_utils=checks)
    torch.library.opcheck(segment._read.op, (q, v, log_decay, state, 0.5), test_utils=checks)


@interpreted
def test_kernels_are_nodes_of_one_graph(monkeypatch):
    # As on a GPU, for the loss, too, which no sequence tells its backend.
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "chunked"))
    dispatch.reset_backend_choice()
    torch._dynamo.reset()
    # Short convolution, norm and gate, delta rule, diagonal scan, tensor attention, cross-entropy.
    model = build(("gated_delta_net", "rg_lru", "tensor_attention"), width=16, heads=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, SequenceContext(boundaries([5, 0, 12])), tokens=17)
    torch._dynamo.reset()
    dispatch.reset_backend_choice()
