"""The planner and the inspection of tiny models: layouts and their command, columns and totals, mistakes."""

import contextlib
import io
import json
from dataclasses import astuple, replace

import pytest

from seqtrain.benchmarks.ranks import on_ranks
from seqtrain.planning import calibrate
from seqtrain.planning.inspect_model import main as inspect
from seqtrain.planning.layout import Holes, Machine, memory_bytes
from seqtrain.planning.layout_runs import Measured
from seqtrain.planning.plan import main
from seqtrain.planning.run_config import count_run, layout_of, read_run

TINY = ("model.layers=[gla,attention]", "model.depth=2", "model.width=32", "model.heads=2")
TINY += ("train.sequence_length=64", "train.batch_size=4", "train.dtype=bfloat16")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("plan"), io.StringIO()
    settings = ("plan.ranks=4", "plan.shown=100", "plan.tokens=1e6", f"plan.output_dir={folder}")
    with contextlib.redirect_stdout(printed):
        assert main([*TINY, *settings]) == 0
    return printed.getvalue(), folder


@pytest.mark.all
def test_every_layout_is_there_the_fastest_first(planned):
    _, folder = planned
    layouts = json.loads((folder / "plan.json").read_text())["layouts"]
    found = [tuple(each["layout"].values()) for each in layouts]
    # (data, sequence, stage, checkpointing, micro-batch, batch): 4 x 1 one row at once, 2 x 2 up to two, 1 x 4 up to 4.
    assert len(found) == len(set(found)) == 4 * 2 * (1 + 2 + 3)
    assert all(data * sequence == 4 for data, sequence, *_ in found)
    times = [each["step_seconds"] for each in layouts]
    assert times == sorted(times)
    for each in layouts:
        assert each["fits"]
        assert each["step_seconds"] == pytest.approx(sum(each["seconds"].values()))
        assert each["peak_bytes"] == pytest.approx(sum(each["bytes"].values()))


@pytest.mark.all
def test_the_table_says_what_binds_and_the_command_launches_it(planned):
    printed, folder = planned
    lines = printed.splitlines()
    for word in ("data", "sequence", "ZeRO", "checkpointing", "micro-batch", "range", "fits", "most of it"):
        assert word in lines[0]
    assert "yes" in lines[1]
    command = next(line for line in lines if line.startswith("python launch/pretrain.py"))
    layout = json.loads((folder / "plan.json").read_text())["layouts"][0]["layout"]
    assert f"parallel.data={layout['data']} parallel.sequence={layout['sequence']}" in command
    assert "train.sequence_length=64" in command
    assert command.count("train.batch_size=") == 1
    assert any("1e+06 tokens take" in line for line in lines)
    assert "nothing was measured here" in printed
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "plan.html").read_text().count("data:image/png;base64,") == 1


@pytest.mark.all
def test_predictions_stand_next_to_a_real_run(tmp_path, capsys):
    settings = ("plan.task=check", "plan.cluster=a100", "plan.layouts=1", "plan.shorter=128", "plan.steps=2")
    # An A100's constants do not fit this machine: the status says so.
    assert main([*settings, f"plan.output_dir={tmp_path}"]) == 1
    [row] = json.loads((tmp_path / "check.json").read_text())["layouts"]
    assert row["measured"]["seconds"] > row["step_seconds"] > 0
    assert row["measured"]["peak_bytes"] >= row["measured"]["start_bytes"] > 50 * 2**20
    assert row["time_error"] == pytest.approx(row["step_seconds"] / row["measured"]["seconds"] - 1)
    assert "of 1 layouts: peak memory within 15% for 0, step time within 30% for 0" in capsys.readouterr().out


@pytest.mark.all
def test_a_sharded_layer_is_timed_against_a_whole_one_and_two_ranks_against_one(monkeypatch):
    monkeypatch.setattr(calibrate, "SHARD_TOKENS", 64)
    found = on_ranks(2, calibrate._sharded, ("gla", "attention"))
    assert found.keys() == {"gla", "attention"}
    assert all(1 <= factor < 100 for factor in found.values())
    assert 1 <= on_ranks(2, calibrate._crowded) < 100


@pytest.mark.full
def test_memory_made_of_known_holes_gives_them_back(monkeypatch):
    # Memory measured is what a machine of known constants would need.
    bare = Machine(name="by hand", memory=1e9)
    holes = {"gla": Holes(0.25, 1.5, 0.5), "attention": Holes(0.5, 2.0, 0.0)}
    true = replace(bare, base=3e8, holes=holes, cut_kept=0.125, cut_passing=0.0625)

    def needed(words, *, steps):
        config = read_run(["experiment=quickstart", *words])
        kinds = memory_bytes(count_run(config), layout_of(config), true)
        tiny = config.model.depth == 1
        return Measured(1.0, 1.0, 0, 0, kinds["program"] if tiny else sum(kinds.values()))

    monkeypatch.setattr(calibrate, "SMALL_LAYOUT", (*calibrate.SMALL_LAYOUT, "train.sequence_length=256"))
    monkeypatch.setattr(calibrate, "SHARDED", ("parallel.sequence=2", "train.sequence_length=512"))
    monkeypatch.setattr(calibrate, "measure_layout", needed)
    found = calibrate._with_memory(bare, ("attention",), lambda what: None)
    assert found.base == true.base
    for name, own in holes.items():
        assert astuple(found.holes[name]) == pytest.approx(astuple(own), abs=1e-6)
    assert (found.cut_kept, found.cut_passing) == pytest.approx((0.125, 0.0625), abs=1e-6)


@pytest.mark.all
def test_a_row_a_part_and_the_whole_is_their_sum(tmp_path, capsys):
    sizes = (*TINY[:4], "train.sequence_length=64", "train.micro_batch_size=2", "inspect.vocab_size=100")
    assert inspect([*sizes, f"inspect.output_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "inspect_model.json").read_text())
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
    assert (tmp_path / "inspect_model.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "inspect_model.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<td>gla</td>" in page
