"""Errors meant for users: one line that names what is wrong, what came, what is allowed, and the way out."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable

# What the core is installed without, by the extra that brings it: names of modules.
EXTRAS = {
    "train": (
        "datasets", "deepspeed", "hydra", "matplotlib", "omegaconf", "pyarrow", "ray", "rich",
        "tensorboardX", "tokenizers", "transformers", "wandb", "yaml",
    ),
    "convert": ("gguf", "peft"),
    "eval": ("lm_eval",),
}  # fmt: skip


class SeqtrainError(ValueError):
    """A mistake in the input. Launchers print it as one line and exit with status 2."""


class ConfigError(SeqtrainError):
    """A configuration key, value or combination that can't be run."""


class DataError(SeqtrainError):
    """A missing, damaged or unreadable data file; the message names the file."""


class CheckpointError(SeqtrainError):
    """A checkpoint that is missing, damaged, or of another model; the message names the folder."""


class FencedError(SeqtrainError):
    """Another start has taken over the folder of this run, so nothing more may be written there."""


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> str:
    """The sentence for an unknown name: `mixer 'gal' is unknown; did you mean 'gla'? Known: ...`."""
    known = sorted(allowed)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{what} {name!r} is unknown{hint} Known: {', '.join(known)}"


def exit_status(work: Callable[[], int]) -> int:
    """The exit status of `work`; a user's mistake, or a package that is not installed, is one printed line and 2."""
    try:
        return work()
    except SeqtrainError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        message = f"{package} is not installed: pip install 'seqtrain[{extra}]'"
    except BrokenPipeError:
        # Whoever read what is printed is gone, as in `... | head`: what Python prints at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    print(f"error: {message}", file=sys.stderr)
    return 2
