"""Two commits compared: which runs are made, what counts as slower, what of a config has changed."""

import json
from pathlib import Path

import pytest

from seqtrain.benchmarks import replay
from seqtrain.benchmarks.commits import ROOT, checkout, read_commit_settings, watch_python
from seqtrain.benchmarks.regression import Figure, Settings
from seqtrain.errors import ConfigError

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


def test_a_word_alone_is_the_commit():
    assert read_commit_settings(Settings, ["abc", "rounds=2"]) == Settings(commit="abc", rounds=2)


@needs_git
def test_a_commit_has_its_files_for_as_long_as_it_is_used():
    with checkout("HEAD") as tree:
        assert (tree / "seqtrain" / "__init__.py").exists()
    assert not tree.exists()
    with pytest.raises(ConfigError, match="commit=nothing"), checkout("nothing"):
        pass


def test_a_program_s_time_is_read_whenever_its_file_has_another_line(tmp_path):
    work = "end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    lines = tmp_path / "lines"
    add = f"    exec({work!r})\n    open(sys.argv[1], 'a').write('x\\n')\n"
    program = f"import sys, time\nfor _ in range(3):\n{add}time.sleep(1)"
    seconds = watch_python(ROOT, ["-c", program, str(lines)], lines)
    # A late look sees more of what the program took, never less; the system counts ticks of 10 ms.
    assert len(seconds) == 3
    assert all(found >= 0.2 * number - 0.02 for number, found in enumerate(seconds, 1))
    with pytest.raises(RuntimeError, match="ended with status 1:\nZero"):
        watch_python(ROOT, ["-c", "import sys; sys.exit('Zero')"])


@pytest.mark.parametrize(
    ("new", "slower"),
    [([1.0] * 5, False), ([1.02] * 5, False), ([1.05] * 5, True), ([0.8, 0.9, 1.05, 1.2, 1.3], False)],
)
def test_slower_is_beyond_three_percent_and_the_spread(new, slower):
    assert Figure("preset", "step", old=[1.0] * 5, new=new).outcome()["slower"] is slower


@needs_git
def test_this_tree_s_runs_are_made_each_time_and_a_commit_s_once(tmp_path, monkeypatch, capsys):
    made, loss = [], [2.0]

    def run_python(tree: Path, arguments: list[str]) -> None:
        if arguments[0] == "-c":
            Path(arguments[2]).write_text(json.dumps({"pretrain": {"seed": len(made)}}))
            return
        folder = Path(arguments[-1].removeprefix("output_dir="))
        made.append(folder.parent.name)
        folder.mkdir()
        (folder / "config.yaml").write_text("{}")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss[0], "grad_norm": 1.0}) + "\n")

    monkeypatch.setattr(replay, "run_python", run_python)
    arguments = ["HEAD", "runs=[softmax]", f"output_dir={tmp_path}"]
    assert replay.main(arguments) == 0
    loss[0] = 2.5
    assert replay.main(arguments) == 1
    assert made[1:] == ["here", "here"]
    assert made[0] not in ("here", "")
    assert "config seed: 1 -> 3  (pretrain)" in capsys.readouterr().out
