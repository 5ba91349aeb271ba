"""tools/plan.py on tiny models: layouts and their command, a check against a real run, mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
H100 = TOOLS / "clusters" / "h100.yaml"
TINY = (
    "model.layers=[gla,attention]",
    "model.depth=2",
    "model.width=32",
    "model.heads=2",
    "train.sequence_length=64",
    "train.batch_size=4",
    "train.dtype=bfloat16",
)


def run(*arguments):
    done = [sys.executable, str(TOOLS / "plan.py"), *arguments]
    return subprocess.run(done, capture_output=True, text=True, timeout=170)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    settings = (f"plan.cluster={H100}", "plan.ranks=4", "plan.shown=100", "plan.tokens=1e6")
    done = run(*TINY, *settings, f"plan.output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


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


def test_the_table_says_what_binds_and_the_command_launches_it(planned):
    printed, folder = planned
    lines = printed.splitlines()
    best = json.loads((folder / "plan.json").read_text())["layouts"][0]
    for word in ("data", "sequence", "ZeRO", "checkpointing", "micro-batch", "range", "fits", "most of it"):
        assert word in lines[0]
    assert "yes" in lines[1]
    command = next(line for line in lines if line.startswith("python launch/pretrain.py"))
    layout = best["layout"]
    assert f"parallel.data={layout['data']} parallel.sequence={layout['sequence']}" in command
    assert "train.sequence_length=64" in command
    assert command.count("train.batch_size=") == 1
    assert any("1e+06 tokens take" in line for line in lines)
    assert "nothing was measured here" in printed
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "plan.html").read_text().count("data:image/png;base64,") == 1


def test_predictions_stand_beside_a_real_run(tmp_path):
    settings = ("plan.task=check", f"plan.cluster={TOOLS / 'clusters' / 'a100.yaml'}", "plan.layouts=1")
    done = run(*settings, "plan.shorter=128", "plan.steps=2", f"plan.output_dir={tmp_path}")
    # An A100's constants do not fit this machine: the status says so.
    assert done.returncode == 1, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "check.json").read_text())["layouts"]
    assert row["measured"]["seconds"] > row["step_seconds"] > 0
    assert row["measured"]["peak_bytes"] >= row["measured"]["start_bytes"] > 50 * 2**20
    assert row["time_error"] == pytest.approx(row["step_seconds"] / row["measured"]["seconds"] - 1)
    assert "of 1 layouts: peak memory within 15% for 0, step time within 30% for 0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.cluster=absent.yaml"], "cluster=absent.yaml: "),
        ([f"plan.cluster={H100}", "plan.ranks=6", "train.batch_size=4"], "train.batch_size=4: no layout of 6 ranks"),
        (["plan.task=plann"], "task"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_cut_layer_is_timed_beside_a_whole_one_and_two_ranks_beside_one():
    # In a process of its own, as the tool is: its ranks are forked.
    code = (
        "import json, _calibrate\n"
        "_calibrate.CUT_TOKENS = 64\n"
        "print(json.dumps(_calibrate.on_ranks(2, _calibrate._cut, ('gla', 'attention'))))\n"
        "print(json.dumps(_calibrate.on_ranks(2, _calibrate._beside)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, beside = map(json.loads, done.stdout.splitlines()[-2:])
    assert 1 <= beside < 100
    assert found.keys() == {"gla", "attention"}
    assert all(1 <= factor < 100 for factor in found.values())


# Memory measured is what a machine of known constants would need.
KNOWN_HOLES = """
import json
from dataclasses import asdict, replace
import _calibrate
from _layout_runs import Measured
from _overrides import count_run, read_run
from seqtrain.analysis.layout import Holes, Machine, memory_bytes

_calibrate.SMALL_LAYOUT = (*_calibrate.SMALL_LAYOUT, "train.sequence_length=256")
_calibrate.CUT = ("parallel.sequence=2", "train.sequence_length=512")
bare = Machine(name="by hand", memory=1e9)
holes = {"gla": Holes(0.25, 1.5, 0.5), "attention": Holes(0.5, 2.0, 0.0)}
true = replace(bare, base=3e8, holes=holes, cut_kept=0.125, cut_passing=0.0625)

def needed(words, *, steps):
    config = read_run(["experiment=quickstart", *words])
    kinds = memory_bytes(count_run(config), _calibrate.layout_of(config), true)
    tiny = config.model.depth == 1
    return Measured(1.0, 1.0, 0, 0, kinds["program"] if tiny else sum(kinds.values()))

_calibrate.measure_layout = needed
found = _calibrate._with_memory(bare, ("attention",), lambda what: None)
print(json.dumps([asdict(found), asdict(true)]))
"""


def test_memory_made_of_known_holes_gives_them_back():
    done = subprocess.run([sys.executable, "-c", KNOWN_HOLES], cwd=TOOLS, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    found, true = json.loads(done.stdout.splitlines()[-1])
    assert found["base"] == true["base"]
    for name, holes in true["holes"].items():
        assert found["holes"][name] == pytest.approx(holes, abs=1e-6)
    assert [found[key] for key in ("cut_kept", "cut_passing")] == pytest.approx([0.125, 0.0625], abs=1e-6)
