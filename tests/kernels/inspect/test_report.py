"""The report of Triton kernels: one example compiled for all targets and counted; examples are found by their names."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import seqtrain.kernels
from seqtrain import cli
from seqtrain.kernels.inspect import examples as kernel_examples
from seqtrain.kernels.inspect import report


@pytest.mark.full
def test_every_target_and_direction_has_a_row_and_bytes_stand_next_to_their_floor(tmp_path):
    # As from a process that interprets: the command compiles all the same.
    command = [sys.executable, "tools/kernel_report.py", "examples=[gated_norm V=128]", f"output_dir={tmp_path}"]
    command = ["env", "TRITON_INTERPRET=1", f"XDG_CACHE_HOME={tmp_path / 'cache'}", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "4 of 4: gated_norm V=128 silu bfloat16 for gfx942" in done.stderr
    rows = json.loads((tmp_path / "kernel_report.json").read_text())
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
        assert f"{row['target']:7} {row['warps']:5}" in done.stdout
    counts = {row["direction"]: row for row in rows["counts"]}
    # 8 heads of 128 bfloat16 numbers: x, gate and out; then x, gate, d_out, dx and d_gate.
    assert counts["forward"]["floor"] == 3 * 8 * 128 * 2
    assert counts["backward"]["floor"] == 5 * 8 * 128 * 2
    for row in counts.values():
        assert row["floor"] <= row["bytes"] <= 1.05 * row["floor"]
        assert (row["launches"], row["flops"]) == (1, 0)


def test_what_was_done_for_the_same_sources_and_packages_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "cache_folder", lambda: tmp_path / "native")
    done = []

    def ask(*arguments):
        return report.kept_results()("compile_example", arguments, lambda: done.append(arguments) or [{"row": 1}])

    assert ask("scan", "sm_90") == ask("scan", "sm_90") == [{"row": 1}]
    assert ask("scan", "sm_80") == [{"row": 1}]
    assert done == [("scan", "sm_90"), ("scan", "sm_80")]
    monkeypatch.setattr(report, "version", lambda package: "another")
    assert ask("scan", "sm_90") == [{"row": 1}]
    assert len(done) == 3


def test_an_unknown_example_is_one_line(capsys):
    assert cli.run("kernel-report", ["examples=[no_such]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: examples=['no_such']: none has such a name. Known: ")
    assert said.count("\n") == 1


BACKENDS = sorted(path.parent.name for path in Path(seqtrain.kernels.__path__[0]).glob("*/triton.py"))


@pytest.mark.parametrize("operator", BACKENDS)
def test_every_backend_joins_the_report_by_its_examples(operator):
    examples = import_module(f"seqtrain.kernels.{operator}.triton").EXAMPLES
    assert examples
    found = kernel_examples.find_examples()
    assert all(found[example.name] is example for example in examples)


def test_two_examples_of_one_name_are_refused(monkeypatch):
    module = import_module("seqtrain.kernels.gated_norm.triton")
    monkeypatch.setattr(module, "EXAMPLES", (*module.EXAMPLES, module.EXAMPLES[0]))
    with pytest.raises(ValueError, match=f"gated_norm.triton: a second example is called '{module.EXAMPLES[0].name}'"):
        kernel_examples.find_examples()


@pytest.mark.full
def test_what_went_wrong_while_counting_is_told():
    with pytest.raises(RuntimeError, match="counting failed: KeyError: 'no such example'"):
        kernel_examples.count_in_child("no such example")


def test_a_process_that_compiles_does_not_count():
    assert isinstance(next(iter(kernel_examples.find_examples().values())), kernel_examples.Example)
    with pytest.raises(RuntimeError, match="start it with TRITON_INTERPRET=1"):
        kernel_examples.count_example(next(iter(kernel_examples.find_examples())))
