"""The report of Triton kernels: one example compiled for all targets and counted; its exit status and errors."""

import json
import subprocess
import sys

import pytest

from seqtrain import cli


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel_report")
    # As from a process that interprets: the command compiles all the same.
    command = [sys.executable, "tools/kernel_report.py", "examples=[gated_norm V=128]", f"output_dir={folder}"]
    done = subprocess.run(["env", "TRITON_INTERPRET=1", *command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout, json.loads((folder / "kernel_report.json").read_text())


@pytest.mark.all
def test_every_target_and_direction_has_a_row(report):
    text, rows = report
    found = {(row["kernel"], row["target"]) for row in rows["kernels"]}
    assert found == {
        (kernel, target) for kernel in ("forward", "backward") for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    for row in rows["kernels"]:
        assert 16 <= row["registers"] <= 255
        assert 1 <= row["blocks"] <= 32
        assert row["spilled"] == row["dots"] == 0
        assert row["instructions"] > 50
        assert row["faults"] == []
        assert f"{row['target']:7} {row['warps']:5}" in text


@pytest.mark.all
def test_bytes_are_listed_next_to_their_floor(report):
    _, rows = report
    counts = {row["direction"]: row for row in rows["counts"]}
    # 8 heads of 128 bfloat16 numbers: x, gate and out; then x, gate, d_out, dx and d_gate.
    assert counts["forward"]["floor"] == 3 * 8 * 128 * 2
    assert counts["backward"]["floor"] == 5 * 8 * 128 * 2
    for row in counts.values():
        assert row["floor"] <= row["bytes"] <= 1.05 * row["floor"]
        assert (row["launches"], row["flops"]) == (1, 0)


def test_an_unknown_example_is_one_line(capsys):
    assert cli.run("kernel-report", ["examples=[no_such]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: examples=['no_such']: none has such a name. Known: ")
    assert said.count("\n") == 1
