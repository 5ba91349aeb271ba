"""Commands, run in this process."""

import contextlib
import tempfile
from dataclasses import dataclass

from seqtrain.cli import run


@dataclass(frozen=True)
class Done:
    """What a command gave: its exit status, and what it printed."""

    status: int
    out: str
    err: str


def run_command(name: str, *arguments: str) -> Done:
    """`seqtrain.cli.run`. What ranks it forks print counts, too."""
    # Files, which forked processes share, line by line; a buffer would be each one's own.
    with tempfile.TemporaryFile("w+", buffering=1) as out, tempfile.TemporaryFile("w+", buffering=1) as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(name, arguments)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Done(status, *texts)
