"""What Triton backends share: pieces of documents, how many there are to be, examples and their floors."""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch

from seqtrain.kernels import gpu
from seqtrain.kernels.gpu import Launch
from seqtrain.kernels.inspect.examples import Example

CPU = torch.device("cpu")


def test_documents_are_cut_into_pieces():
    table = gpu.pieces((0, 5, 5, 12), 4, CPU)
    assert table.dtype == torch.int32
    assert table.tolist() == [[0, 0, 4, 0, 1], [0, 4, 5, 0, 1], [2, 5, 9, 2, 3], [2, 9, 12, 2, 3]]


def test_pieces_begin_with_the_past():
    assert gpu.pieces((0, 5, 5), 4, CPU, past=3).tolist() == [
        [0, -3, 4, 0, 1],
        [0, 4, 5, 0, 1],
        [1, 2, 5, 2, 2],  # an empty document has its past
    ]


def test_rows_are_documents_of_one_length():
    x = torch.zeros(3, 7, 2)
    assert gpu.boundaries(x, None) == (0, 7, 14, 21)
    assert gpu.boundaries(x[:1], torch.tensor([0, 2, 7])) == (0, 2, 7)
    assert gpu.boundaries_tensor((0, 2, 7), CPU).tolist() == [0, 2, 7]


@pytest.mark.parametrize(
    ("tokens", "blocks", "expected"),
    [
        (100_000, 264, 100_000),  # channels alone fill the GPU: documents stay whole
        (100_000, 1, 379),
        (100_000, 100, 33_334),
        (300, 1, 64),  # not shorter than this
    ],
)
def test_pieces_are_so_long_that_programs_fill_a_gpu(tokens, blocks, expected):
    assert gpu.piece_length((0, tokens), blocks, 64) == expected


def test_a_launch_names_all_its_options():
    options = Launch(warps=8, stages=3, sizes={"BT": 64}).options()
    assert options == {"BT": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def test_an_example_makes_its_inputs_and_knows_its_floor():
    def operator(x, log_a, weight, labels, *, factor, backend):
        assert (backend, factor) == ("triton", 2)
        return x + log_a, weight

    tensors = {
        "x": ("B T D", "bfloat16"),
        "log_a": ("B T D", "float32"),
        "weight": ("D", "float32"),
        "labels": ("B T", "int64"),
    }
    example = Example("sum", operator, tensors, {"B": 2, "D": 3}, {"factor": 2})
    inputs = example.inputs(10)
    assert {name: (tuple(x.shape), x.dtype, x.requires_grad) for name, x in inputs.items()} == {
        "x": ((2, 10, 3), torch.bfloat16, True),
        "log_a": ((2, 10, 3), torch.float32, True),
        "weight": ((3,), torch.float32, True),
        "labels": ((2, 10), torch.int64, False),
    }
    assert inputs["log_a"].max() <= 0
    # A token's x, log_a and label are read, its sum (float32) is written; gradients in turn.
    read, written = 3 * 2 + 3 * 4 + 8, 3 * 4
    assert example.floor(example.call(inputs), 10) == (read + written, 2 * read + written)


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
