"""Products of linear layers by the fastest exact float32 routine that this machine has.

PyTorch multiplies float32 matrices on CPUs by MKL, which is slow on processors of some makers. oneDNN's routine, which
PyTorch brings as well, sums the same products in another order. Which of the two is faster is found by a probe, the
first time a large product is asked for on a machine, and kept in the user's cache folder: two runs of one command have
the same bits. A run is told which one it began with (`use`), for wherever else it goes on.
"""

import hashlib
import logging
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqtrain.files import remembered
from seqtrain.kernels.native.build import cache_folder
from seqtrain.threads import one_thread

log = logging.getLogger("seqtrain.kernels")

ROUTINES = ("torch", "onednn")
# Multiply-adds of a product below which oneDNN's call takes longer than it saves: half a millisecond's worth.
LEAST = 1 << 24
# What the probe multiplies: rows, inputs and outputs of a layer; how often; and by how much oneDNN has to be faster.
PROBED, REPEATS, MARGIN = (512, 512, 1024), 7, 0.95
# How many times faster bfloat16 has to be to be worth its rounding.
WORTH = 1.2

_chosen = ""


def use(routine: str) -> None:
    """Has this process multiply by a routine: one of `ROUTINES`, or "auto" for the faster one. Says so on the log."""
    global _chosen
    reason = "" if routine == "auto" else unavailable(routine)
    if reason:
        log.warning("linear layers: %s %s; torch's, whose last bits differ", routine, reason)
        routine = "torch"
    elif routine == "onednn":
        log.info("linear layers: products of oneDNN, as this run began")
    _chosen = "" if routine == "auto" else routine


def chosen() -> str:
    """The routine in use."""
    return _chosen or fastest()[0]


@cache
def fastest() -> tuple[str, float]:
    """The fastest routine, by a probe of a fifth of a second, and how many times faster than torch's it is."""
    if unavailable("onednn"):
        return "torch", 1.0
    ratio = _kept("onednn", _onednn_ratio)
    routine = "onednn" if ratio * MARGIN > 1 else "torch"
    log.info("linear layers: products of %s (oneDNN's are %.2f times as fast as torch's)", routine, ratio)
    return routine, max(ratio, 1.0)


def _onednn_ratio() -> float:
    # In turns, so that what others do on the machine falls on both.
    turns = [[sum(map(sum, measure(routine, *PROBED, repeats=1))) for routine in ROUTINES] for _ in range(REPEATS)]
    return statistics.median(plain / other for plain, other in turns)


@cache
def bfloat16_ratio() -> float:
    """How many times faster products in bfloat16 are than the fastest in float32, by a probe.

    0 on a CPU that has no instructions for them.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return 0.0
    return _kept("bfloat16", _bfloat16_ratio)


def _bfloat16_ratio() -> float:
    wide = min(sum(min(each) for each in measure(routine, *PROBED)) for routine in ROUTINES if not unavailable(routine))
    return wide / sum(min(each) for each in measure("torch", *PROBED, dtype=torch.bfloat16))


def _kept(what: str, probe: Callable[[], float]) -> float:
    """What `probe` measured first on a processor like this one. Where nothing can be kept, it measures each time."""
    about = [torch.__version__, torch.backends.cpu.get_cpu_capability(), os.environ.get("MKL_ENABLE_INSTRUCTIONS", "")]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += [line for line in lines if line.startswith("model name")][:1]
    key = hashlib.sha256("\0".join(about).encode()).hexdigest()[:20]
    return remembered(cache_folder() / f"{what}-{key}.json", float, probe)


@cache
def unavailable(routine: str) -> str | None:
    """Why a routine can't be used here, or None."""
    if routine == "torch":
        return None
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "is not in this build of PyTorch"
    return None


def measure(
    routine: str, rows: int, inputs: int, outputs: int, *, dtype: torch.dtype = torch.float32, repeats: int = REPEATS
) -> list[list[float]]:
    """CPU seconds, `repeats` times, of each product of a linear layer: forward, the gradients of inputs and weights."""
    x, weight, d_out = (_numbers(*shape, dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    multiply, times = _ROUTINES[routine], []
    with torch.no_grad(), one_thread():
        for a, b in ((x, weight), (d_out, weight.T), (d_out.T, x.T)):
            times.append([_seconds(multiply, a, b) for _ in range(repeats)])
    return times


def _numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """No zeros, and no random draws, which would take longer than the products."""
    return torch.linspace(-1, 1, rows * columns).view(rows, columns).to(dtype)


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, of float32 on a CPU by the routine in use."""
    if not _large(x, weight) or chosen() == "torch":
        return F.linear(x, weight, bias)
    out = _Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def product(a: Tensor, b: Tensor, *, into: Tensor | None = None) -> Tensor:
    """`a @ b.T` of `a: [n,k]`, `b: [m,k]`, without a gradient, by the routine in use; in `into`, if it can."""
    if _large(a, b) and chosen() != "torch":
        return _ROUTINES[chosen()](a, b)
    return _by_torch(a, b) if into is None else torch.mm(a, b.T, out=into)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds `product(a, b)` to `total`."""
    if not _large(a, b) or chosen() == "torch":
        total.addmm_(a, b.T)
    else:
        total += product(a, b)


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether a routine can be chosen for the product, and is worth it."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= LEAST
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        # Neither fake tensors nor integers that pass for numbers; and what watches products sees PyTorch's own.
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and torch._C._len_torch_function_stack() == 0
    )


def _by_torch(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    # It would copy a left factor that lies transposed, as of weights' gradients: 114 GFLOP/s against 147.
    if not a.is_contiguous():
        return _by_torch(a, b)
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


_ROUTINES = {"torch": _by_torch, "onednn": _by_onednn}


class _Product(torch.autograd.Function):
    """`a @ b.T`; its gradients are products again, which have gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return product(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        [d_out] = grads
        need_a, need_b = ctx.needs_input_grad
        d_a = _Product.apply(d_out, b.T) if need_a else None
        return d_a, _Product.apply(d_out.T, a.T) if need_b else None
