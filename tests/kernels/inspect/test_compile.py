"""Compiling for GPUs that are not here: what is read of the machine code, what is a fault, what fits at a time."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from seqtrain.kernels.inspect.compile import CompiledKernel
from seqtrain.kernels.inspect.targets import TARGETS

DECAYS = ("no decay", "decay [B,T,H]", "decay [B,T,H,K]")
CHECKED = ("delta_rule decay [B,T,H]", "sm_90")


@pytest.fixture(scope="module")
def compiled():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.inspect.compile_cases"],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {(row["target"], row["warps"]): row for row in json.loads(done.stdout)}


@pytest.mark.all
@pytest.mark.parametrize(("target", "matrix", "buffers"), [("sm_80", "HMMA", 1), ("sm_90", "HGMMA", 2)])
def test_matrix_and_copy_instructions_are_found(compiled, target, matrix, buffers):
    row = compiled[target, 8]
    assert (row["dots"], row["wide_dots"], row["faults"]) == (1, 1, [])
    assert row["matrix"][matrix] > 0
    assert row["copies"]["LDGSTS"] > 0
    assert row["spilled"] == 0
    assert row["arguments"]["a"] == "bfloat16"
    assert row["arguments"]["BM"] == "128"
    # Tiles of [128,64] bfloat16 for each of the two operands.
    assert row["shared"] == buffers * 2 * 128 * 64 * 2


@pytest.mark.all
def test_amd_is_read_from_its_assembly(compiled):
    row = compiled["gfx942", 8]
    assert any(name.startswith("v_mfma") for name in row["matrix"])
    assert (row["spilled"], row["faults"]) == (0, [])


@pytest.mark.all
def test_one_warp_for_too_much_is_a_fault(compiled):
    row = compiled["sm_90", 1]
    assert row["registers"] == 255
    spills, lost = row["faults"]
    assert spills == f"spills {row['spilled']} B per thread (at most 0)"
    assert lost == "has no HGMMA for its 1 products of matrices"


def test_limits_of_a_kernel():
    good = CompiledKernel(
        kernel="k", target="gfx942", grid=(1,), arguments={}, warps=4, stages=1, registers=64, spilled=64,
        shared=65536, blocks=1, dots=1, wide_dots=0, matrix={"v_mfma": 1}, copies={}, instructions=9,
    )  # fmt: skip
    assert good.faults() == []
    assert replace(good, spilled=65).faults() == ["spills 65 B per thread (at most 64)"]
    assert replace(good, shared=65540).faults() == ["takes 65540 B of shared memory (at most 65536)"]
    assert replace(good, matrix={}).faults() == ["has no matrix instruction for its 1 products of matrices"]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        ("sm_90", 128, 0, 4, 0, 4),  # 65536 registers
        ("sm_90", 129, 0, 4, 0, 3),  # handed out by eights
        ("sm_90", 32, 100_000, 4, 0, 2),  # 233472 bytes, 1024 more a block
        ("sm_90", 16, 0, 8, 0, 8),  # 2048 threads
        ("sm_100", 64, 0, 4, 256, 2),  # 512 columns of tensor memory
        ("gfx942", 128, 0, 4, 0, 4),  # 512 registers a lane, four units
        ("gfx942", 32, 40_000, 4, 0, 1),
    ],
)
def test_blocks_that_fit(target, registers, shared, warps, columns, expected):
    assert TARGETS[target].blocks(registers, shared, warps, columns) == expected


# Rows that are cut into pieces: what they launch spills nowhere.
@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=pytest.mark.all if (name, target) == CHECKED else pytest.mark.full)
        for name in (f"{operator} {decay}" for operator in ("delta_rule", "linear_attention") for decay in DECAYS)
        for target in ("sm_90", "sm_100")
    ],
)
def test_kernels_of_rows_that_are_cut_spill_nowhere(name, target):
    code = (
        "import json, sys; from seqtrain.kernels.inspect.examples import compile_example;"
        "print(json.dumps(compile_example(*sys.argv[1:])))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, f"long row of {name} K=V=128 bfloat16", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {"maps", "carry", "forward", "reverse", "gradients"} <= {row["kernel"] for row in rows}
    assert {row["kernel"]: row["faults"] for row in rows if row["faults"]} == {}
    assert all(row["spilled"] == 0 for row in rows)
