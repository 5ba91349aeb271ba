"""The planner and the inspection of tiny models: layouts and their command, columns and totals, mistakes."""

import contextlib
import io
import json
import math
import shlex
from dataclasses import replace

import pytest

from seqtrain.benchmarks.ranks import on_ranks
from seqtrain.config import compose_config
from seqtrain.errors import ConfigError
from seqtrain.planning import calibrate
from seqtrain.planning.inspect_model import main as inspect
from seqtrain.planning.layout import Layout, Machine, Prediction
from seqtrain.planning.layout_runs import Measured
from seqtrain.planning.plan import as_given, duration, fits, layouts_of, main
from seqtrain.planning.run_config import last_of_each, layout_of, read_run
from seqtrain.runtime.resolving import read_pretrain_config

SMALL = ("model.layers=[gla,attention]", "model.depth=2", "model.width=32", "model.heads=2")
TINY = (*SMALL, "train.sequence_length=64", "train.batch_size=4", "train.dtype=float32")


def planned_of(folder, *words):
    """What was printed, and plan.json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*words, f"plan.output_dir={folder}"]) == 0
    return printed.getvalue(), json.loads((folder / "plan.json").read_text())


def command_in(printed):
    """The config that the printed command launches."""
    program, *words = shlex.split(printed[printed.index("python launch/pretrain.py") :].replace("\\\n", ""))[1:]
    assert program == "launch/pretrain.py"
    return words, read_pretrain_config(compose_config("pretrain", words))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return *planned_of(folder, *TINY, "plan.ranks=4", "plan.shown=100", "plan.tokens=1e6"), folder


@pytest.mark.all
def test_every_layout_is_there_the_fastest_first(planned):
    _, content, _ = planned
    layouts = content["layouts"]
    found = [tuple(each["layout"].values()) for each in layouts]
    # 4 x 1 one row at once, 2 x 2 up to two, 1 x 4 up to 4; of 2 tensor ranks and at most stage 2, 2 x 1 and 1 x 2.
    assert len(found) == len(set(found)) == 4 * 2 * (1 + 2 + 3) + 3 * 2 * (2 + 3)
    sizes = [[each["layout"][key] for key in ("data", "sequence", "tensor")] for each in layouts]
    assert {math.prod(each) for each in sizes} == {4}
    times = [each["step_seconds"] for each in layouts]
    # Of those about as fast, another may come first.
    assert times[0] <= 1.02 * min(times)
    slower = [time for time in times if time > 1.02 * min(times)]
    assert slower
    assert times[-len(slower) :] == sorted(slower)
    for each in layouts:
        assert each["fits"]
        assert each["step_seconds"] == pytest.approx(sum(each["seconds"].values()))
        assert each["peak_bytes"] == pytest.approx(sum(each["bytes"].values()))


@pytest.mark.all
def test_the_table_says_what_binds_and_the_command_launches_it(planned):
    printed, content, folder = planned
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    for word in ("data x seq", "ZeRO", "again", "rows", "GiB per rank", "fits", "most of it"):
        assert word in lines[0]
    assert " yes " in lines[1]
    words, config = command_in(printed)
    assert layout_of(config) == Layout(**content["layouts"][0]["layout"])
    assert {"data=stdlib", "model=hybrid_tiny", "data.tokenizer=bytes", "train.dtype=float32"} <= set(words)
    assert words.count("train.batch_size=4") == 1
    # 1e6 tokens in steps of 4 x 64.
    assert config.train.steps == 3907
    assert "3,907 steps on 1e+06 tokens: about" in printed
    assert "nothing was measured here" in printed
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "plan.html").read_text().count("data:image/png;base64,") == 1


@pytest.mark.all
def test_the_batch_is_looked_for_and_what_is_given_stays(tmp_path):
    given = ("data=text", "data.path=my books", "train.sequence_length=256", "parallel.sequence=2")
    printed, content = planned_of(tmp_path, *SMALL, *given, "plan.ranks=4")
    batches = {each["layout"]["batch"] for each in content["layouts"]}
    # The preset's step has 16 rows of 512 tokens; two tensor ranks leave one group for a batch of one.
    assert batches == {1, 2, 4, 8, 16, 32}
    assert {each["layout"]["sequence"] for each in content["layouts"]} == {2}
    words, config = command_in(printed)
    assert "data.path=my books" in words
    # What an H100 is made for; as many tokens as the preset trains on.
    assert config.train.dtype == "bfloat16"
    assert config.train.steps * config.train.batch_size * 256 == 1000 * 16 * 512


def test_layouts_that_no_ranks_have_are_refused():
    config = read_run([*TINY, "train.batch_size=3"])
    assert {each.batch for each in layouts_of(config, 2)} == {3}
    with pytest.raises(ConfigError, match=r"train.batch_size=3: no layout of 5 ranks divides it"):
        layouts_of(config, 5)
    # Steps of few tokens: the least that the ranks can share.
    assert {each.batch for each in layouts_of(config, 6, step_tokens=1)} == {3}
    with pytest.raises(ConfigError, match=r"parallel.data=3 train.batch_size=4: no layout of 2 ranks is so"):
        main([*TINY, "parallel.data=3", "plan.ranks=2"])


def test_shards_are_looked_for_and_launched_as_planned():
    config = read_run([*TINY, "train.batch_size=128"])
    layouts = layouts_of(config, 128)
    assert {each.shard for each in layouts if each.stage} == {0, 8, 64}
    assert {each.shard for each in layouts if not each.stage} == {0}
    assert {each.shard for each in as_given(layouts, {"parallel.shard": "8"})} == {8}
    for layout in layouts[5 :: len(layouts) // 3]:
        words = [*TINY, "runtime=ray", *layout.overrides()]
        assert layout_of(read_run(last_of_each(*words))) == layout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.26, "about 1.3 s (0.8 to 1.9)"), (720, "about 12 min (8.0 to 18)"), (9e4, "about 25 h (17 to 38)")],
)
def test_a_duration_has_its_range(seconds, words):
    assert duration(seconds, 0.5) == words


def test_memory_fits_surely_perhaps_or_not():
    machine = Machine(name="by hand", memory=100.0, memory_error=0.25)
    one = Prediction(Layout(1, 1, 0, False, 1, 1), {}, {}, {}, room=100.0)
    sizes = {79.0: "yes", 81.0: "perhaps", 124.0: "perhaps", 126.0: "no"}
    assert {size: fits(replace(one, bytes={"all": size}), machine) for size in sizes} == sizes


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


def test_a_machine_that_was_measured_knows_what_lies_unused_and_how_wrong_it_is():
    layout, bare = Layout(1, 1, 0, False, 1, 1), Machine(name="by hand", memory=1e9)
    pairs = []
    for kept, passing, slower in ((100.0, 10.0, 1.5), (50.0, 80.0, 0.5), (20.0, 60.0, 1.0)):
        sizes = {"program": 300.0, "activations kept": kept, "temporaries and gradients": passing, "unused": 0.0}
        peak = sum(sizes.values()) + 0.25 * kept + 1.5 * passing
        pairs.append((Prediction(layout, {"calls": 2.0}, {}, sizes, 1e9), Measured(2 * slower, 0, 0, 0, peak)))
    found = calibrate.with_errors(bare, pairs)
    assert (found.unused_kept, found.unused_passing) == pytest.approx((0.25, 1.5))
    assert (found.memory_error, found.time_error) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.all
def test_a_row_a_part_and_the_whole_is_their_sum(tmp_path, capsys):
    sizes = (*SMALL, "train.sequence_length=64", "train.micro_batch_size=2", "inspect.vocab_size=100")
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
    # The last one names the files.
    assert max(map(len, lines[:-1])) <= 100
