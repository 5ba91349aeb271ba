"""Files and folders as torn disks, other programs and hostile people leave them, and what commands make of them.

A `Base` is something that a command reads and takes. A case is a copy of it in which one file was damaged, a function
of its base and number alone; the command runs in a child that was forked from this warm process.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.errors import exit_status

# What stands in place of numbers, texts, lists and objects.
WRONG = [-1, 0, 10**29, 10**14, 1e29, 1e308, -0.5, float("nan"), float("inf"), "", "x", "\0", [], ["x"], {"x": 1}, None]
WRONG += [True, "../../etc/passwd", "/dev/zero", 2**31, "a" * 5000, 3.5, False, "ü\ud800"]
# What `other_numbers` leaves that is no weight.
REFUSED = (" nan", "inf", " int64", " bool", " complex64", " float64", " empty", " more", " missing")
# Seconds, and bytes beside what this process has, that no case may take.
LIMIT, MEMORY = 20, 3 * 2**30
# Names of folders that shells, Hydra, globs and URLs give a meaning to.
NAMES = [
    "plain",
    "a=b",
    "(x)",
    "two words",
    "Größe",
    "x,y",
    "[a-b]",
    "{z}",
    "it's",
    '"q"',
    "$HOME",
    "~",
    "*",
    "#1",
    "%d",
]
# Of a run's or a corpus' own, and kept on purpose.
KEPT = {"cache", ".epochs"}


@dataclass(frozen=True)
class Base:
    """`make`: writes what is read into a folder. `use`: what a command does with it.

    `damaged`: the files that cases change. `culprit`: words of which a message has one, besides the name of the file
    that was damaged.
    """

    make: Callable[[Path], None]
    use: Callable[[Path], object]
    damaged: str = "**/*"
    culprit: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, minus a signal's number; None if it hung. What it printed, and left."""

    status: int | None
    said: str
    left: tuple[str, ...]


def in_a_child(work: Callable[[], object], said: Path) -> int | None:
    """The exit status of `work` in a forked process, minus a signal's number; None where it outlasts the limit.

    What it prints to stderr is in `said`.
    """

    def run() -> None:
        os.setsid()
        with open(os.devnull, "r+b") as nothing, said.open("ab") as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(nothing.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", errors="backslashreplace")
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", buffering=1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        status = 1
        try:
            status = exit_status(lambda: int(bool(work() and 0)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(LIMIT)
    hung = child.exitcode is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    return None if hung else child.exitcode


def content(folder: Path) -> set[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(name) for name in names if not KEPT.intersection(name.parts)}


def try_case(base: Base, made: Path, number: int, name: str) -> str:
    """What is wrong with how a damaged copy of `made` is taken; empty where it is refused well, or taken."""
    chance = random.Random(f"{name}-{number}")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / chance.choice(NAMES)
        shutil.copytree(made, folder, symlinks=True)
        files = sorted(path for path in folder.glob(base.damaged) if path.is_file())
        file = chance.choice(files)
        try:
            how = damage(file, chance)
        except Exception as error:
            raise AssertionError(f"{name}-{number}: {file.name}") from error
        before, said = content(folder), Path(root) / "said.txt"
        status = in_a_child(lambda: base.use(folder), said)
        text = said.read_text(errors="replace")
        left = sorted(content(folder) - before) if status else []
        left += [str(path.relative_to(folder)) for path in folder.rglob("*.partial")]
        wrong = judge(status, text, left, (file.name, *base.culprit))
        # Of a run's checkpoints, only the newest is read, and its hashes tell.
        if status == 0 and file.parent.name == "model" and file.suffix == ".safetensors" and how.endswith(REFUSED):
            wrong = "is taken"
    return wrong and f"{name}-{number}: {file.relative_to(folder)} {how}: {wrong}"


def judge(status: int | None, said: str, left: list[str], culprit: tuple[str, ...]) -> str:
    if status is None:
        return "hangs"
    if status < 0:
        return f"dies by {signal.Signals(-status).name}: {said[-200:]}"
    if "Traceback (most recent call last)" in said or status not in (0, 2):
        return f"status {status}: {said.strip()[-600:]}"
    lines = [line for line in said.splitlines() if line]
    if status and (not lines or not lines[-1].startswith("error: ")):
        return f"ends with {lines[-1:]}"
    if status and not any(word in lines[-1] for word in culprit):
        return f"does not name {culprit}: {lines[-1]}"
    if status and len(lines[-1]) > 2010:
        return f"a line of {len(lines[-1])} letters: {lines[-1][:200]}"
    if status and left:
        return f"leaves {left[:3]}"
    return ""


def damage(file: Path, chance: random.Random) -> str:
    """Damages `file` in one of the ways there are for its kind; which."""
    kinds: list[Callable[[Path, random.Random], str]] = [flipped, torn, replaced, junk]
    if file.suffix in (".json", ".jsonl"):
        kinds += [other_value] * 5 + [deep]
    if file.suffix == ".yaml":
        kinds += [other_value] * 5
    if file.suffix == ".safetensors":
        kinds += [other_header] * 3 + [other_numbers] * 2
    if file.suffix == ".gguf":
        kinds += [flipped_early] * 5
    return chance.choice(kinds)(file, chance)


def flipped(file: Path, chance: random.Random) -> str:
    data = bytearray(file.read_bytes())
    places = [chance.randrange(len(data)) for _ in range(chance.choice([1, 4, 64])) if data]
    for place in places:
        data[place] ^= chance.randrange(1, 256)
    file.write_bytes(data)
    return f"with {len(places)} bytes flipped"


def flipped_early(file: Path, chance: random.Random) -> str:
    """In the part that says what the rest is."""
    data = bytearray(file.read_bytes())
    places = [chance.randrange(min(len(data), 2000)) for _ in range(chance.choice([1, 4]))]
    for place in places:
        data[place] = chance.choice([0, 1, 255, chance.randrange(256)])
    file.write_bytes(data)
    return f"with the bytes {places} set to {[data[place] for place in places]}"


def torn(file: Path, chance: random.Random) -> str:
    size = chance.choice([0, 1, 7, chance.randrange(file.stat().st_size + 1), max(file.stat().st_size - 1, 0)])
    os.truncate(file, size)
    return f"torn at {size}"


def junk(file: Path, chance: random.Random) -> str:
    kind, data = chance.choice(
        [
            ("null", b"null"), ("a list", b"[]"), ("an object", b"{}"), ("a text", b'"x"'), ("NaN", b"NaN"),
            ("NULs", bytes(5000)), ("UTF-16", file.name.encode("utf-16")),
            ("a mark", b"\xef\xbb\xbf" + file.read_bytes()),
            ("bytes", chance.randbytes(3000)), ("twice", file.read_bytes() * 2), ("a blank line", b"\n"),
            ("gzip", b"\x1f\x8b\x08\x00" + chance.randbytes(100)), ("a pickle", b"\x80\x04\x95" + chance.randbytes(50)),
        ]
    )  # fmt: skip
    file.write_bytes(data)
    return f"is {kind}"


def replaced(file: Path, chance: random.Random) -> str:
    """Another thing of the same name."""
    kinds = ["pipe", "folder", "/dev/zero", "/dev/full", "/proc/self/mem", "loop", "broken", "none", "outside"]
    # A text of any length is a text.
    kind = chance.choice([*kinds, *(["huge"] if file.suffix != ".txt" else [])])
    if kind == "huge":
        os.truncate(file, 2**42)
        return "is 4 TiB"
    if kind == "outside":
        file.rename(file.parent.with_name(f"moved-{file.name}"))
        file.symlink_to(file.parent.with_name(f"moved-{file.name}"))
        return "is a link out of its folder"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "none":
        file.symlink_to({"loop": file, "broken": file.with_name("nowhere")}.get(kind, kind))
    return f"is a {kind}"


def deep(file: Path, chance: random.Random) -> str:
    many = chance.choice([3000, 200_000])
    file.write_text(chance.choice(["[", '{"a":']) * many)
    return f"nested {many} deep"


def other_value(file: Path, chance: random.Random) -> str:
    """One value of the file replaced, or left out."""
    import yaml

    if file.suffix == ".yaml":
        values = yaml.safe_load(file.read_text())
        how = _change(values, chance)
        file.write_text(yaml.safe_dump(values, allow_unicode=True) if "\\ud800" not in how else yaml.safe_dump(values))
        return how
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    place = chance.randrange(len(lines))
    values = json.loads(lines[place])
    how = _change(values, chance)
    lines[place] = json.dumps(values)
    file.write_text("\n".join(lines) + "\n")
    return f"line {place + 1}: {how}" if len(lines) > 1 else how


def _change(values: Any, chance: random.Random) -> str:
    node, keys = values, []
    while isinstance(node, dict | list) and node:
        parent = node
        keys.append(chance.choice(list(node) if isinstance(node, dict) else range(len(node))))
        node = node[keys[-1]]
        if chance.random() < 0.5:
            break
    if not keys:
        return "nothing to change"
    where = ".".join(map(str, keys))
    if chance.random() < 0.2:
        del parent[keys[-1]]
        return f"without {where}"
    parent[keys[-1]] = value = chance.choice(WRONG)
    return f"with {where}={value!r:.40}"


def other_header(file: Path, chance: random.Random) -> str:
    """Of safetensors: a value of the header."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if chance.random() < 0.4:
        name = chance.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = chance.choice(["F64", "F16", "BF16", "I64", "I32", "BOOL", "C64", "F8_E4M3", "U8", "X"])
        how = f"{name} is {header[name]['dtype']}"
    else:
        how = _change(header, chance)
    told = json.dumps(header).encode()
    file.write_bytes(
        struct.pack("<Q", chance.choice([len(told)] * 5 + [2**63, 0, len(told) + 1])) + told + data[8 + size :]
    )
    return f"header: {how}"


def other_numbers(file: Path, chance: random.Random) -> str:
    """Of safetensors: another number or type in a tensor."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        tensors, said = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    name = chance.choice(sorted(tensors))
    tensor = tensors[name].clone()
    how = chance.choice(["nan", "inf", "-inf", "int64", "bool", "complex64", "float64", "empty", "more", "missing"])
    if how in ("nan", "inf", "-inf"):
        tensor.view(-1)[chance.randrange(tensor.numel()) :] = float(how)
    elif how == "float64":
        tensor = tensor.double() * 1e300
    elif how == "empty":
        tensor = tensor[:0]
    elif how not in ("more", "missing"):
        tensor = tensor.to(getattr(torch, how))
    tensors |= {f"{name}.more" if how == "more" else name: tensor}
    if how == "missing":
        del tensors[name]
    save_file(tensors, file, said)
    return f"{name} {how}"


@contextlib.contextmanager
def made(bases: dict[str, Base]) -> Iterator[Callable[[str], Path]]:
    """The folder of each base by its name, made in a child when it is first asked for."""
    with tempfile.TemporaryDirectory() as root:

        def find(name: str) -> Path:
            folder, said = Path(root) / name, Path(root) / f"{name}.txt"
            if not folder.exists():
                folder.mkdir()
                status = in_a_child(lambda: bases[name].make(folder), said)
                assert status == 0, f"{name}: {status}: {said.read_text()}"
            return folder

        yield find


def main(arguments: list[str]) -> None:
    """Tries so many cases of the named bases: `python -m tests.hostile.hostile_cases 100 jsonl parquet`."""
    from tests.hostile.bases import BASES

    count, names = int(arguments[0]), arguments[1:] or list(BASES)
    with made(BASES) as find:
        for name in names:
            began, found = time.monotonic(), 0
            for number in range(count):
                if wrong := try_case(BASES[name], find(name), number, name):
                    found += 1
                    print(wrong, flush=True)
            print(f"== {name}: {found} of {count}, {(time.monotonic() - began) / count:.2f} s each", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
