"""`seqtrain COMMAND`: the table of commands, text without torch, completion."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from seqtrain import cli
from seqtrain.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
# Prints the exit status of each command line, and whether torch came in.
TEXTS = """
import sys
from seqtrain.cli import main
lines = ["--help", "pretrain --cfg job model=hybrid_125m", "pretrain train.stepz=1", *sys.argv[1:]]
print([main(line.split()) for line in lines], "torch" in sys.modules, file=sys.stderr)
"""


def test_text_and_wrong_keys_cost_no_import_of_torch():
    helps = [f"{name} --help" for name in COMMANDS]
    result = subprocess.run([sys.executable, "-c", TEXTS, *helps], capture_output=True, text=True, timeout=200)
    statuses = [0, 0, 2, *(0 for _ in helps)]
    assert result.stderr.splitlines()[-1] == f"{statuses} False"
    assert "lr: 0.0006" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main(name):
    assert callable(importlib.import_module(COMMANDS[name].module).main)


def test_the_commands_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed
        assert command.about in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "command 'pretrian' is unknown; did you mean 'pretrain'?"),
        (["generate", "temprature=1"], "did you mean 'temperature'?"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, message):
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("seqtrain pre", "pretrain"),
        ("seqtrain pretrain model=hybrid", "model=hybrid_125m model=hybrid_tiny"),
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
