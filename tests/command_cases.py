"""Commands, run in this process, and the one line that a mistake is."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from seqtrain.cli import run
from seqtrain.errors import ConfigError


@contextlib.contextmanager
def refused(message: str, error: type[Exception] = ConfigError) -> Iterator[None]:
    """What is done in it must end in an `error` of one line, `message` among its words."""
    with pytest.raises(error, match=re.escape(message)) as caught:
        yield
    assert "\n" not in str(caught.value)


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
