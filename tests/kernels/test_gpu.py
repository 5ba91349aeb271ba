"""Where Triton kernels can run, and what is said where they can not."""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch

from seqtrain.kernels import gpu

CPU = torch.device("cpu")


@pytest.fixture
def forgetful():
    """What was found out about the assembler here is not for this test, nor what it pretends for others."""
    gpu._unsound_assembler.cache_clear()
    yield
    gpu._unsound_assembler.cache_clear()


@pytest.mark.parametrize(
    ("capability", "own", "other", "reason", "path"),
    [
        ((9, 0), "12.8", "13.1", None, "/other"),
        ((9, 0), "12.8", "12.8", "needs ptxas 12.9 or newer on Hopper (Triton's is 12.8)", None),
        ((9, 0), "13.0", "12.8", None, None),
        ((8, 0), "12.8", "12.8", None, None),
    ],
)
def test_an_assembler_that_errs_on_hopper_is_not_used(monkeypatch, forgetful, capability, own, other, reason, path):
    import triton.backends.nvidia.compiler as compiler
    from triton import knobs

    tool = type(knobs.nvidia.ptxas_blackwell)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: tool("/own", own))
    monkeypatch.setattr(knobs, "nvidia", SimpleNamespace(ptxas_blackwell=tool("/other", other)))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    came = gpu.unavailable()
    assert came == reason or (reason and came.startswith(reason))
    assert (os.environ["TRITON_PTXAS_PATH"] or None) == path


def test_without_triton_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.unavailable() == "needs Triton (pip install 'seqtrain[gpu]')"


def test_a_triton_that_lacks_what_kernels_name_is_not_used(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.4.0")
    assert gpu.unavailable() == "needs Triton 3.5 or newer (this is 3.4.0)"


def test_kernels_run_on_cuda_alone():
    assert gpu.refuses("cuda") is None
    assert gpu.refuses("cpu") == "needs a CUDA device"


def test_a_process_whose_triton_compiles_does_not_interpret(monkeypatch):
    importlib.import_module("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.refuses("cpu").startswith("can't be interpreted: Triton compiles in this process; start it with TRITON_")


class _Triton:
    """Stands for a kernel: what Triton was asked to find, and what was launched without asking."""

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def find(*arguments, **options):
            self.asked.append((grid, arguments, options))
            return _Compiled(self.launched)

        return find


class _Compiled:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


def test_triton_looks_for_a_kernel_once_for_each_kind_of_arguments():
    triton, x = _Triton(), torch.zeros(20)
    kernel = gpu.BoundKernel(triton, 3, {"M": "constants", "num_warps": 4})
    for _ in range(2):
        kernel((x, None), x, 0.5)
    assert triton.asked == [((3, 1, 1), ((x, None), x, 0.5), {"M": "constants", "num_warps": 4})]
    assert triton.launched == [((3, 1, 1), ((x, None), x, 0.5, "constants"))]
    # Another dtype, one more tensor, memory that is aligned to 4 bytes: each may be another machine code.
    for arguments in [((x.half(), None), x, 0.5), ((x, x), x, 0.5), ((x, None), x[1:], 0.5)]:
        kernel(*arguments)
    assert len(triton.asked) == 4
    gpu.BoundKernel(triton, 0, {})(x)
    assert len(triton.asked) == 4
