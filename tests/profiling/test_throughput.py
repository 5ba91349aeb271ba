"""Profiles of a tiny run: files, columns, a sweep."""

import json
import re
from itertools import product

import pytest

from seqtrain.parallel.testing import run_ranks
from seqtrain.profiling import read_profiles
from tests.command_cases import run_command
from tests.runtime.runtime_cases import launched, write_text

KINDS = {"parameters", "gradients", "optimizer", "buffers", "loss", "activations", "program", "working memory"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    text = write_text(root / "text")
    tiny = ("model.depth=2", "model.width=16", "model.heads=2", "train.sequence_length=32", "train.batch_size=2")
    here = ("runtime=inline", "runtime.cpus_per_worker=1", "parallel.data=1", "data=text", f"data.path={text}")
    arguments = (
        "--multirun", "model.layers=[gla],[attention]", *tiny, *here, f"data.cache_dir={root / 'cache'}",
        "profile.steps=2", "profile.warmup=1", "profile.peak=0.01", "profile.trace=true", f"output_dir={root / 'out'}",
    )  # fmt: skip
    # In a process of its own: a group formed here would be in the way of later forks.
    work = (lambda ranks: run_command("profile", *arguments), ())
    [done] = run_ranks(1, launched, 1, *work, limit=250)
    assert done.status == 0, done.out + done.err
    return done.out, root / "out"


@pytest.mark.all
def test_a_point_leaves_its_report(sweep):
    _, out = sweep
    folder = out / "0"
    names = {"profile.json", "ranks.json", "report.html", "trace.json", "run", "parts.png", "layers.png", "memory.png"}
    assert {path.name for path in folder.iterdir()} == names
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (folder / "run" / "checkpoints").exists()
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page), "nothing is loaded from elsewhere"


@pytest.mark.all
def test_the_parts_are_those_of_the_model_and_sum_to_the_steps(sweep):
    _, out = sweep
    report = json.loads((out / "0" / "profile.json").read_text())
    found = {(row["kind"], row["phase"]) for row in report["parts"]}
    both = set(product(("gla", "mlp", "norm, residual", "embedding", "loss"), ("forward", "backward")))
    alone = {("data", ""), ("optimizer", ""), ("gradients", "backward"), ("communication", "collective")}
    assert found == both | alone | {("other", ""), ("other", "backward")}
    # By construction: every moment of a step is in one part.
    for rank in read_profiles(out / "0" / "ranks.json"):
        for index, step in enumerate(rank["steps"]["profiled"]):
            assert sum(part["seconds"][index] for part in rank["parts"]) == pytest.approx(step, abs=0.005)
    assert {row["layer"] for row in report["layers"] if row["kind"] == "gla"} == {0, 1}
    assert len(report["warm_up_seconds"]) == 1
    assert report["tokens_per_step"] == 2 * 32
    assert report["flops"]["executed"] > report["flops"]["model"] > 0
    assert report["flops"]["mfu"] > 0
    assert report["checkpoint"]["bytes"] > 0
    # Memory has its kinds and its moment.
    report = json.loads((out / "1" / "profile.json").read_text())
    [memory] = report["memory"]
    assert set(memory["kinds"]) == KINDS
    assert sum(memory["kinds"].values()) == memory["peak_bytes"]
    assert memory["kinds"]["parameters"] == 4 * report["parameters"]
    assert {row["layer"] for row in memory["layers"] if row["kind"] == "attention"} == {0, 1}
    assert memory["peak_part"]["kind"]


@pytest.mark.all
def test_the_trace_is_one_perfetto_reads_and_a_sweep_one_table_and_one_picture(sweep):
    printed, out = sweep
    events = json.loads((out / "0" / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert {"gla forward", "gla backward", "optimizer", "data"} <= {event["name"] for event in spans}
    ends = [event["ts"] + event["dur"] for event in spans]
    assert ends[:-1] == pytest.approx([event["ts"] for event in spans[1:]])
    assert {path.name for path in out.iterdir()} >= {"0", "1", "sweep.json", "sweep.html", "sweep.png"}
    assert "tokens/s" in printed
    points = [row["point"] for row in json.loads((out / "sweep.json").read_text())]
    assert points == ["layers=[gla]", "layers=[attention]"]
    assert "layers=[attention]" in printed.split("MFU")[-1]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_a_profile_is_left_alone(tmp_path):
    (tmp_path / "profile.json").write_text("{}")
    done = run_command("profile", f"output_dir={tmp_path}")
    assert done.status == 2
    assert "holds a profile already" in done.err
    assert len(done.err.splitlines()) == 1
