"""The patched interpreter: bfloat16 as GPUs compute it, loops, scans, and what it says of a launch."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, install, nan_filled_empty, recording

BF16 = torch.bfloat16
pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def installed():
    """As the choice of `backend="triton"` does; the kernels here belong to no operator."""
    install()


@triton.jit
def elementwise(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, i < n)
    b = tl.load(y + i, i < n, 1.0)
    if OP == "add":
        c = a + b
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = a / b
    elif OP == "less":
        c = tl.where(a < b, a, b)
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "to_f32":
        c = (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)
    elif OP == "neg":
        c = -a
    tl.store(out + i, c, i < n)


@pytest.mark.parametrize("op", ["add", "mul", "div", "less", "fma", "to_f32", "neg"])
def test_bfloat16_is_rounded_to_nearest(op):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(100, generator=generator).to(BF16) for _ in "xy")
    x[:3] = torch.tensor([float("inf"), float("nan"), 3e38])
    out = torch.zeros(100, dtype=BF16)
    elementwise[(4,)](x, y, out, 100, op, 32)
    wide, other = x.double(), y.double()
    expected = {
        "add": wide + other,
        "mul": wide * other,
        "div": wide / other,
        "less": torch.where(wide < other, wide, other),
        "fma": wide * other + wide,
        "to_f32": wide * other,
        "neg": -wide,
    }[op].to(BF16)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def product(a, b, out, PRECISION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@pytest.mark.parametrize(
    ("dtype", "precision", "low", "high"),
    [
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32", 1e-5, 2e-3),
        (BF16, "ieee", 0, 1e-6),
        (torch.float64, "ieee", 0, 1e-14),
    ],
)
def test_products_have_the_precision_asked_for(dtype, precision, low, high):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in "ab")
    out = torch.zeros(32, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with recording() as launches:
        product[(1,)](a, b, out, precision, 32)
    error = (out.double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
    assert low <= error <= high
    assert (launches[0].dots, launches[0].dot_flops) == (1, 2 * 32**3)


@triton.jit
def overlapping(x, out, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - SHIFT) + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n), i < n)


def test_bytes_are_counted_once_and_races_are_named():
    x, out = torch.randn(64), torch.zeros(64)
    with recording() as launches:
        overlapping[(2,)](x, out, 64, 0, 32)
        overlapping[(2,)](x, out, 60, 4, 32)
    clean, racing = launches
    assert (clean.traffic["x"].read, clean.traffic["out"].written, clean.bytes) == (256, 256, 512)
    assert (racing.traffic["x"].read, racing.traffic["out"].rewritten) == (240, 4)
    assert_no_races([clean])
    with pytest.raises(AssertionError, match=r"overlapping: out: .*'rewritten': 4"):
        assert_no_races([racing])


@triton.jit
def neighbour(x, n):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + (i + 1) % n))


@pytest.mark.parametrize(("order", "expected"), [("given", [1, 2, 3, 1]), ("reversed", [0, 0, 0, 0])])
def test_programs_run_in_the_order_asked_for(order, expected):
    x = torch.arange(4.0)
    with recording(order=order) as launches:
        neighbour[(4,)](x, 4)
    assert x.tolist() == expected
    assert launches[0].traffic["x"].crossed == 4


def test_accesses_outside_of_the_tensors_are_errors():
    with pytest.raises(IndexError, match="overlapping: read outside of its tensors"):
        overlapping[(2,)](torch.zeros(32), torch.zeros(64), 64, 0, 32)


@triton.jit
def through_descriptor(source, out, R: tl.constexpr, C: tl.constexpr):
    tile = source.load([tl.program_id(0) * R, 0])
    tl.store(out + (tl.program_id(0) * R + tl.arange(0, R)[:, None]) * C + tl.arange(0, C), tile)


def test_descriptors_are_watched_too():
    x, out = torch.randn(20, 16), torch.full((32, 16), 7.0)
    with recording() as launches:
        through_descriptor[(2,)](TensorDescriptor.from_tensor(x, [16, 16]), out, 16, 16)
    assert torch.equal(out[:20], x)
    assert not out[20:].any()
    assert launches[0].traffic["source"].read == 20 * 16 * 4


def test_nans_around_and_in_what_was_never_written():
    x = torch.randn(1, 5, 3)
    inner = between_nans(x, rows=2)
    assert torch.equal(inner, x)
    memory = torch.empty(0).set_(inner.untyped_storage())
    assert memory.isnan().sum() == 2 * 2 * 3
    with nan_filled_empty():
        assert torch.empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
