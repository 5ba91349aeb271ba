"""Programs of another commit of this repository, run with that commit's own code."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from seqtrain.config import read_settings
from seqtrain.errors import ConfigError

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
# Lines of a failed program's output that its error repeats.
SHOWN = 15


def read_commit_settings(cls: type[T], arguments: Sequence[str]) -> T:
    """As `read_settings`; a word that is not `key=value` is the `commit`."""
    return read_settings(cls, [word if "=" in word else f"commit={word}" for word in arguments])


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of `commit` in a temporary folder. Raises `ConfigError` where there is no such commit."""
    full = resolve(commit)
    with tempfile.TemporaryDirectory(prefix=f"seqtrain-{full[:7]}-") as folder:
        archive = subprocess.run(["git", "archive", full], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def resolve(commit: str) -> str:
    """The full hash of `commit`."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        raise ConfigError(f"commit={commit}: no such commit in {ROOT}")
    return found.stdout.strip()


def run_python(tree: Path, arguments: Sequence[str]) -> float:
    """Runs `python *arguments` with the code in `tree`; the CPU seconds that it and its children took.

    Raises `RuntimeError` with the end of its output where it fails.
    """

    def child_seconds() -> float:
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    environment = {**os.environ, "PYTHONPATH": str(tree), "WANDB_MODE": "disabled"}
    before = child_seconds()
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, text=True, **output)
    if done.returncode:
        shown = "\n".join(done.stdout.strip().splitlines()[-SHOWN:])
        raise RuntimeError(f"{' '.join(arguments)} in {tree} ended with status {done.returncode}:\n{shown}")
    return child_seconds() - before
