"""Settings of a tool: a frozen dataclass, `key=value` on the command line, and what a report says of its machine."""

import inspect
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import OmegaConf

import seqtrain
from seqtrain.config import validate
from seqtrain.errors import ConfigError, SeqtrainError

T = TypeVar("T")


def read_settings(cls: type[T], arguments: Sequence[str], *, about: str | None) -> T:
    """`cls` from `key=value` arguments; `--help` prints `about` and the dataclass itself, defaults and units included.

    A wrong key or value is printed as one line, and the tool exits with status 2.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{about}\n\nSettings, as key=value:\n\n{inspect.getsource(cls)}")
        sys.exit(0)
    try:
        for argument in arguments:
            if "=" not in argument:
                raise ConfigError(f"{argument!r} is not key=value; --help lists the keys")
        values = OmegaConf.to_container(OmegaConf.from_cli(list(arguments)))
        return validate(cls, {str(key): value for key, value in values.items()})  # type: ignore[union-attr]
    except SeqtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def machine(device: str = "cpu") -> dict[str, str]:
    """The device's name, threads, versions and the commit, for the head of a report."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu()
    versions = {"torch": torch.__version__, "seqtrain": seqtrain.__version__}
    if torch.device(device).type == "cuda":
        versions["triton"] = version("triton")
    return {"device": name, "threads": str(torch.get_num_threads()), "commit": _commit(), **versions}


def version(package: str) -> str:
    """Of an installed package, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    return (commit + ("-dirty" if git("status", "--porcelain") else "")) or "unknown"
