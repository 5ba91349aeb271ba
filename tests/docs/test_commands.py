"""What stands in README and docs/ can be pasted: every command line and every piece of Python runs, in small."""

import json
import re
import runpy
import shlex
import shutil
import sys
import uuid
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from tests.command_cases import run_command
from tests.data.test_token_files import write_datatrove, write_megatron

pytestmark = pytest.mark.all

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{page.relative_to(ROOT / 'docs')}" for page in sorted((ROOT / "docs").rglob("*.md")))]
# Lines of a shell that no test of this file runs, by their beginning, and why.
ELSEWHERE = {
    "launch/quickstart": "CI runs it",
    "python -m pytest": "this suite",
    ".venv/bin/python -m pytest": "this suite",
    "TRITON_INTERPRET=1 python -m pytest": "this suite",
    "source .venv/bin/activate": "makes no difference here",
    "cp examples/new_mixer/qrnn.py": "tests/launch runs that example",
    "python launch/pretrain.py 'model.layers=[qrnn]'": "tests/launch runs that example",
    "ray start": "needs nodes",
    "ray job submit": "needs nodes",
    "python launch/pretrain.py output_dir=runs/mine checkpoint.store=": "tests/runtime has a store",
    "pip install": "CI's quickstart installs",
    "python tools/compare_optimizers.py": "takes hours; tests/benchmarks runs it in small",
    "python tools/compare_recipes.py": "likewise",
}
NEEDS_NODES = "FIRST_NODE"
MODEL = ["model.depth=2", "model.width=32", "model.heads=2"]
TRAINING = [*MODEL, "train.steps=2", "train.sequence_length=64", "train.batch_size=2", "evaluation.max_tokens=512"]
TRAINING += ["data.held_out=0.2", "runtime=inline", "parallel.data=1", "parallel.sequence=1", "parallel.tensor=1"]
TRAINING += ["checkpoint.every=0", "sample.tokens=4"]
STAGE = ["steps=2", "batch_size=2", "sequence_length=32"]
# What makes each command short, where it does any work.
SHORT = {
    "pretrain": TRAINING,
    "generate": ["tokens=4"],
    "profile": [*TRAINING, "profile.steps=1", "profile.warmup=1", "profile.peak=0.05"],
    "plan": [*MODEL, "train.sequence_length=256", "train.batch_size=2", "plan.nodes=1", "plan.ranks=1"],
    "inspect": [*MODEL, "train.sequence_length=256", "train.batch_size=2"],
    "convert": [
        *("layer.window=16", "verify.tokens=64", "verify.sequences=1", "verify.generate=8", "verify.gap_closed=0"),
        *(f"recipe.stages.{stage}.{short}" for stage in ("transfer", "kl") for short in STAGE),
    ],
}


def shell_lines(page):
    """The command lines of the indented and ```bash blocks of a page."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    text = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)
    first = r"(?:python |seqtrain |torchrun |launch/|tools/|ray |pip |cp |source |\.venv|[A-Z_]+=\S+ )"
    return re.findall(rf"^ {{4}}(?:\$ )?({first}.*)$", text, flags=re.MULTILINE)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


COMMANDS = {page: lines for page in PAGES if (lines := shell_lines(page))}
WITH_PYTHON = (
    "README.md",
    "docs/howto/python.md",
    "docs/conversion.md",
    "docs/howto/pretrained.md",
    "docs/howto/audit.md",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A home and a working folder with what the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"{'Once upon a time there was a def main(x). ' * 40}{number}" for number in range(40)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    answer = {"role": "assistant", "content": "Once upon a time."}
    talks = [{"messages": [{"role": "user", "content": f"What, {number}?"}, answer]} for number in range(40)]
    for name, content in {
        "books/one.txt": "\n".join(texts),
        "books/two.txt": "\n".join(reversed(texts)),
        "logs/a.jsonl": lines,
        "corpus.jsonl": lines,
        "chat.jsonl": "\n".join(map(json.dumps, talks)),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def make_teacher():
    """A tiny Llama, its conversion, and its tokenizer, where the pages have them."""
    sys.argv = ["convert_tiny.py", "."]
    runpy.run_path("examples/convert_tiny.py")
    Path("path/to").mkdir(parents=True)
    shutil.copytree("teacher", "path/to/SmolLM2-135M")
    shutil.copytree("teacher", "path/to/tokenizer")


def make_corpora():
    """The texts as a parquet file and a Hugging Face dataset; tokens as others write them."""
    import datasets

    rows = datasets.Dataset.from_json("corpus.jsonl")
    Path("corpus").mkdir()
    rows.to_parquet("corpus/a.parquet")
    rows.save_to_disk("path/to/dataset")
    tokens = [np.arange(300) % 90] * 40
    write_megatron(Path("tokens/web_text_document"), tokens)
    write_datatrove(Path("tokens/a.ds"), tokens)


def make_runs():
    """Two runs to compare, one to resume, and that one exported."""
    assert run_command("pretrain", "data=text", "data.path=books", *TRAINING, "output_dir=a").status == 0
    shutil.copytree("a", "b")
    shutil.copytree("a", "runs/mine")
    assert run_command("export", "run=runs/mine", "output_dir=exported").status == 0


def shortened(line):
    """The command and the arguments of a line, with what makes it short."""
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word.startswith(("launch/", "tools/", "examples/")) or word == "seqtrain")
    arguments = words[words.index(script) + 1 :]
    if script.startswith("examples/"):
        return script, arguments
    name = re.search(r'run\("([\w.-]+)"', (ROOT / script).read_text())[1]
    if {"--help", "--cfg"} & set(arguments) or any(word.startswith("run=") for word in arguments if name == "pretrain"):
        return name, arguments
    has_data = any(word.startswith("data=") for word in arguments)
    data = ["data=text", "data.path=books"] if name in ("pretrain", "profile", "convert") and not has_data else []
    short = [word for word in SHORT.get(name, []) if "stages" not in word or "recipe=transfer_then_kl" in arguments]
    if any(word.startswith("source=") for word in arguments):
        short = [word for word in short if word not in MODEL]
    # In one process, the default's time stands still.
    own = any(word.startswith("output_dir=") for word in arguments) or name not in ("pretrain", "profile")
    output = [] if own else [f"output_dir=runs/{uuid.uuid4().hex}"]
    return name, [*arguments, *data, *short, *output]


def runs_here(line):
    return NEEDS_NODES not in line and not line.startswith(tuple(ELSEWHERE))


def run_lines(page, done):
    """The lines of a page but for those in `done`, which an earlier page has."""
    for line in filter(runs_here, COMMANDS.get(page, ())):
        if (words := tuple(shlex.split(line, comments=True))) in done:
            continue
        done.add(words)
        name, arguments = shortened(line)
        for word in arguments:
            if word.startswith("output_dir="):
                shutil.rmtree(word.partition("=")[2], ignore_errors=True)
        if name.startswith("examples/"):
            sys.argv = [name, *arguments]
            runpy.run_path(name, run_name="__main__")
            continue
        expected = 2 if "train.stepz" in line else 0
        came = run_command(name, *arguments)
        assert came.status == expected, f"{page}: {line}\n{came.out}\n{came.err}"


def run_pages():
    """All pages one after the other, on one teacher, one pair of runs: to make them takes longest."""
    for make in (make_teacher, make_corpora, make_runs):
        make()
    done = set()
    for page in PAGES:
        run_lines(page, done)
    for page in WITH_PYTHON:
        names = {}
        for block in python_blocks(page):
            exec(compile(block, page, "exec"), names)


@pytest.mark.timeout(600)
def test_what_the_pages_say_runs(folder):
    """In a process of its own: a run leaves a process group, which no later test is to find."""
    process = get_context("fork").Process(target=run_pages)
    process.start()
    process.join()
    assert process.exitcode == 0, "see above"
