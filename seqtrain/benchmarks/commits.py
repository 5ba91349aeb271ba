"""Programs of this repository in processes of their own, also with the code of another commit."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, SeqtrainError

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
# Lines of a failed program's output that its error repeats.
SHOWN = 15
# Seconds between two looks at a file.
LOOK = 0.01


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


def run_here(program: str, overrides: Sequence[str], *, statuses: Collection[int] = (0,)) -> None:
    """Runs `program`, a path in this tree. Raises `SeqtrainError` with its last line for a status not in `statuses`."""
    command = [sys.executable, str(ROOT / program), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in statuses:
        raise SeqtrainError((done.stderr or done.stdout).strip().splitlines()[-1])


def run_python(tree: Path, arguments: Sequence[str]) -> None:
    """Runs `python *arguments` with the code in `tree`. Raises `RuntimeError` with the end of its output on failure."""
    watch_python(tree, arguments)


def watch_python(tree: Path, arguments: Sequence[str], lines: Path | None = None) -> list[float]:
    """As `run_python`; the CPU seconds that it and its children had taken as the file `lines` got each of its lines."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "WANDB_MODE": "disabled"}
    command, found = [sys.executable, *arguments], list[float]()
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, cwd=tree, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(LOOK)
            if lines and lines.exists() and (count := lines.read_bytes().count(b"\n")) > len(found):
                with suppress(psutil.Error):
                    found += [sum(process.cpu_times()[:4])] * (count - len(found))
        if process.returncode:
            said.seek(0)
            shown = "\n".join(said.read().strip().splitlines()[-SHOWN:])
            raise RuntimeError(f"{' '.join(arguments)} in {tree} ended with status {process.returncode}:\n{shown}")
    return found
