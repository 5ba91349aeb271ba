"""The files that `data.path` stands for: links followed, each file once, and what is left out with its reason."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from seqtrain.errors import DataError

# Names given as examples of many.
SHOWN = 3
AGAIN = "links to what is read anyway"

# Says of a path that is no folder why it is left out, "" if it is not; None: nobody asked for it.
Choice = Callable[[str], str | None]


@dataclass
class Found:
    """`files` in reading order; `left_out`: by reason, what was not taken."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(Path(path))

    def take(self, path: str, choice: Choice) -> bool:
        """Whether `path`, which is no folder, is a file to be read, which it then is."""
        reason = choice(path)
        if reason is None:
            return False
        if not os.path.exists(path):
            reason = "broken links"
        elif not os.path.isfile(path):
            reason = "neither files nor folders"
        if reason:
            self.leave_out(reason, path)
        else:
            self.files.append(Path(path))
        return not reason


def readable(name: str) -> str:
    """A file's name that can be printed whatever its bytes are."""
    return name.encode("utf-8", errors="backslashreplace").decode()


def some(paths: Iterable[Path]) -> str:
    """The first few of `paths`, by their names."""
    names = [readable(path.name) for path in paths]
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def ending(suffix: str | tuple[str, ...]) -> str:
    """Names that end so, or in one of several ways, as they are told."""
    return f"*{suffix if isinstance(suffix, str) else suffix[0]}"


def ending_in(suffix: str | tuple[str, ...]) -> Choice:
    """Files whose names end so, or in one of several ways, in capitals or not."""
    return lambda path: "" if path.lower().endswith(suffix) else f"not {ending(suffix)}"


def walk(root: Path, choice: Choice, skip: frozenset[str] = frozenset()) -> Found:
    """Files under `root` that are chosen, sorted by name, but for hidden ones and what is named in `skip`.

    Raises `DataError` for a folder that can't be listed.
    """
    found, taken = Found(), set[str]()
    # Links come after all else: what can be reached without one has the name that it has there.
    folders, links = [(str(root), os.path.realpath(root))], deque[str]()
    while folders or links:
        if folders:
            folder, real = folders.pop()
        else:
            folder = links.popleft()
            real = os.path.realpath(folder)
            if real not in taken and not os.path.isdir(folder):
                if found.take(folder, choice):
                    taken.add(real)
                continue
        if real in taken:
            found.leave_out(AGAIN, folder)
            continue
        taken.add(real)
        for entry in _entries(folder):
            inside = f"{real}/{entry.name}"
            if entry.name.startswith("."):
                found.leave_out("hidden", entry.path)
            elif entry.name in skip:
                continue
            elif entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                folders.append((entry.path, inside))
            elif found.take(entry.path, choice):
                taken.add(inside)
    found.files.sort(key=lambda file: file.relative_to(root).as_posix())
    return found


def matching(pattern: str) -> Found:
    """The files that `pattern` matches, `**` for folders at any depth, sorted by name. Raises `DataError` as `walk`."""
    parts = Path(pattern).parts
    if "**" in parts:
        # glob follows links that lead in circles, and passes over folders that it can't list.
        fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        if not root.is_dir():
            return Found()
        return walk(root, lambda path: "" if _matches(Path(path).parts[fixed:], parts[fixed:]) else None)
    found, taken = Found(), set[str]()
    for path in sorted(sorted(glob.glob(pattern)), key=os.path.islink):
        if (real := os.path.realpath(path)) in taken:
            found.leave_out(AGAIN, path)
        elif not os.path.isdir(path) and found.take(path, ending_in("")):
            taken.add(real)
    found.files.sort()
    return found


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (len(parts) > 0 and _matches(parts[1:], pattern))
    return len(parts) > 0 and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        where = f"{readable(folder)}: can't be listed ({error.strerror})"
        raise DataError(f"{where}, so its files would be missing") from None
