"""`seqtrain COMMAND`: the table of commands, text without torch, completion."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seqtrain import cli
from seqtrain.cli import COMMANDS, main
from tests.command_cases import run_command

ROOT = Path(__file__).parents[1]
# Prints the exit status of each command line, and whether torch came in.
TEXTS = """
import sys
from seqtrain.cli import main
lines = ["--help", "pretrain --cfg job model=hybrid_125m", "pretrain train.stepz=1", *sys.argv[1:]]
print([main(line.split()) for line in lines], "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.all
def test_text_and_wrong_keys_cost_no_import_of_torch():
    helps = [f"{name} --help" for name in COMMANDS]
    result = subprocess.run([sys.executable, "-c", TEXTS, *helps], capture_output=True, text=True, timeout=200)
    statuses = [0, 0, 2, *(0 for _ in helps)]
    assert result.stderr.splitlines()[-1] == f"{statuses} False"
    assert "lr: 0.0006" in result.stdout
    assert "Keys, as KEY=VALUE:" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_a_table_that_fit_a_terminal(name, capsys):
    assert main([name, "--help"]) == 0
    about, table = capsys.readouterr().out.split("Keys, as KEY=VALUE:")
    assert about.count("\n    seqtrain ") + about.count("\n    torchrun ") >= 3
    assert max(map(len, about.splitlines())) <= 120
    assert max(map(len, table.splitlines())) <= 100
    for key in ("output_dir", "seed") if name == "pretrain" else ():
        assert f"  {key} " in table


def test_choices_are_those_of_the_command(capsys):
    main(["convert", "--help"])
    choices = capsys.readouterr().out.split("Choices, as ")[1].split("Keys, as ")[0]
    found = [line.split()[0] for line in choices.splitlines() if line[:3].strip()]
    assert found[1:] == ["recipe", "data", "runtime", "tracking"]


def test_a_composed_config_says_what_its_keys_mean(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, again, other = (_printed(capsys, f"pretrain --cfg job seed={seed}") for seed in (3, 3, 4))
    assert first == again != other
    assert yaml.safe_load(first)["seed"] == 3
    assert "  depth: 6                                 # Number of blocks" in first


def _printed(capsys, line):
    assert main(line.split()) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["generate", "convert", "compare", "bench-regression"])
def test_what_is_required_comes_with_an_example(name, capsys):
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert re.match(rf"error: \w+: is required.*, as in: seqtrain {name} .*\n$", message)


def test_the_commands_are_listed_and_there(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed
        assert command.about in printed
        assert callable(importlib.import_module(command.module).main)


MISTAKES = [
    ("pretrian", "command 'pretrian' is unknown; did you mean 'pretrain'?"),
    ("pretrain train.stepz=10", "config key 'train.stepz' is unknown; did you mean 'train.steps'?"),
    ("pretrain train.steps=ten", "train.steps=ten: must be a valid integer"),
    ("pretrain model.layers=[gated_delta_nett]", "did you mean 'gated_delta_net'?"),
    ("pretrain model=hybrid_tinny", "did you mean 'hybrid_tiny'?"),
    ("pretrain mixer.gla.bogus=1", "config key 'mixer.gla.bogus' is unknown"),
    ("pretrain +nonsense=1", "config key 'nonsense' is unknown"),
    ("pretrain model.width=100 model.heads=7", "model.width=100"),
    ("pretrain runtime=inline parallel.data=2", "parallel.data=2"),
    ("pretrain train.micro_batch_size=all", "train.micro_batch_size=all: must be a valid integer"),
    ("pretrain runtime.address=10.0.0.7:6379", "runtime.address=10.0.0.7:6379: a cluster beyond this machine must ask"),
    (
        "pretrain runtime.address=ray://a:10001",
        "runtime.address=ray://a:10001: Ray's client can't start ranks; start the",
    ),
    ("pretrain runtime.workers=[4,2]", "runtime.workers=[4, 2]: must be the fewest and the most ranks, as [2,4]"),
    ("pretrain runtime.workers=[1,3] parallel.sequence=4", "is a multiple of parallel.sequence x parallel.tensor=4"),
    ("pretrain runtime.workers=[1,2] runtime=inline", "runtime.workers=[1, 2]: torchrun's ranks are as many as it"),
    ("pretrain parallel.sequence=1000", "parallel.sequence=1000: more ranks than train.sequence_length=512 has tokens"),
    ("pretrain parallel.algorithm=rings", "parallel.algorithm=rings: must be"),
    ("pretrain data=text", "data.path"),
    ("pretrain data=text data.path=/no/such/folder", "/no/such/folder"),
    ("pretrain checkpoint.resume=/no/such/checkpoint", "/no/such/checkpoint"),
    ("generate", "run: is required"),
    ("generate run=/no/such/run", "run=/no/such/run: is neither a run"),
    ("generate run=x temprature=1", "did you mean 'temperature'?"),
    ("generate run=x top_p=2", "top_p=2: must be less than or equal to 1"),
    ("compare runs=[none,nowhere]", "none: no such run"),
    ("inspect model.widht=32", "did you mean 'model.width'"),
    ("plan plan.cluster=absent.yaml", "cluster=absent.yaml: "),
    ("plan plan.ranks=6 train.batch_size=4", "train.batch_size=4: no layout of 6 ranks"),
    ("plan plan.task=plann", "task"),
    ("audit model=/no/such", "model=/no/such: no folder with a config.json"),
    ("audit model=x checks=[docments]", "checks: check 'docments' is unknown; did you mean 'documents'?"),
    ("simulate schemes=[autos]", "schemes: 'autos' is unknown. Known: auto, "),
    ("simulate cluster=absent.yaml", "cluster=absent.yaml: "),
    ("simulate cluster=a100", "compute_ms=0: the cluster file has no forward and backward"),
    ("bench-operators token=[64]", "config key 'token' is unknown; did you mean 'tokens'?"),
    ("bench-operators dtype=float16", "dtype.0=float16: must be 'float32' or 'bfloat16'"),
    ("bench-operators tokens", "'tokens' is not key=value; --help lists the keys"),
    ("bench-all-scan forms=[dense]", "did you mean 'form'?"),
    ("bench-memory layers=[glaa]", "did you mean 'gla'"),
    ("experiments.interaction.run mixers=[atention]", "mixer 'atention' is unknown; did you mean 'attention'?"),
    ("experiments.fidelity.run rows=[recal]", "rows= 'recal' is unknown; did you mean 'recall'?"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    done = run_command(*line.split())
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1, done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("seqtrain pret", "pretrain"),
        (
            "seqtrain pretrain model=hybrid",
            "model=hybrid_125m model=hybrid_1b model=hybrid_350m model=hybrid_7b model=hybrid_tiny",
        ),
        ("seqtrain pretrain train.seq", "train.sequence_length="),
        ("seqtrain generate tem", "temperature="),
    ],
)
def test_words_are_completed(capsys, monkeypatch, line, found):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.strip() == found


def test_doors_lead_to_commands():
    for door in [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("[!_]*.py")]:
        text = door.read_text()
        if "seqtrain.cli" in text:
            name = text.partition('run("')[2].partition('"')[0]
            assert name in cli.COMMANDS or name.startswith("experiments.")
