"""Inspecting a tiny model: its columns, its totals, its files."""

import contextlib
import io
import json

import pytest

from seqtrain.planning.inspect_model import main

TINY = ("model.layers=[gla,attention]", "model.depth=2", "model.width=32", "model.heads=2", "train.sequence_length=64")


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("inspect"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*TINY, "train.micro_batch_size=2", "inspect.vocab_size=100", f"inspect.output_dir={folder}"]) == 0
    return printed.getvalue(), folder


def test_a_row_a_part_and_the_whole_is_their_sum(inspected):
    printed, folder = inspected
    report = json.loads((folder / "inspect_model.json").read_text())
    parts, whole = report["parts"], report["totals"]
    assert [row["part"] for row in parts] == ["embedding", "gla", "mlp", "attention", "mlp", "loss"]
    assert whole["parameters"] == sum(row["parameters"] for row in parts)
    assert whole["tokens"] == 2 * 64
    assert whole["forward_flops"] == pytest.approx(128 * sum(row["flops_a_token"] for row in parts))
    # Keys and values of 64 tokens, 2 heads of 16 numbers of 4 bytes; how many they are, and the next position.
    assert parts[3]["state_bytes"] == 2 * 64 * 32 * 4 + 2 * 8
    assert whole["saved_bytes_checkpointed"] < whole["saved_bytes"]
    lines = printed.splitlines()
    assert lines[0].split()[:3] == ["layer", "part", "parameters"]
    assert lines[2].split()[:3] == ["0", "gla", f"{parts[1]['parameters']:,}"]
    assert f"{whole['parameters']:,} parameters" in printed
    assert (folder / "inspect_model.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "inspect_model.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<td>gla</td>" in page
