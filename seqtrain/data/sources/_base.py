"""What every source of text is: an ordered list of documents that can be entered anywhere and read piece by piece."""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from seqtrain.data.config import DataConfig
from seqtrain.errors import ConfigError, DataError

# Text is read and tokenized in pieces of at most this many bytes, so that no document decides the memory used.
PIECE_BYTES = 2**18


@dataclass(frozen=True)
class Part:
    """What one source reads: `path` (file, folder or pattern), the config key it came from, the share held out."""

    key: str
    path: str
    held_out: float


@dataclass(frozen=True)
class Document:
    """One text, read by byte offset. `units` is its share of `Source.total`, for the progress bar."""

    name: str
    held_out: bool
    size: int
    units: float

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes of the text from `offset`."""
        raise NotImplementedError

    def pieces(self, offset: int = 0) -> Iterator[tuple[bytes, int]]:
        """`(bytes, offset after them)` from `offset` on: cut at line ends where possible, never in a character."""
        while offset < self.size:
            piece = self.read(offset, min(PIECE_BYTES, self.size - offset))
            if not piece:
                raise DataError(
                    f"{self.name}: ends at byte {offset} of {self.size}; it changed while it was read; rerun"
                )
            if offset + len(piece) < self.size:
                piece = piece[: _cut(piece)]
            offset += len(piece)
            yield piece, offset


@dataclass(frozen=True)
class RowDocument(Document):
    """A text held in memory: a row of a table or a line of a file."""

    data: bytes

    def read(self, offset: int, count: int) -> bytes:
        return self.data[offset : offset + count]


class Source:
    """Base of the sources. A subclass lives in a file named after it and lists documents in a fixed order."""

    # What `total` counts: "bytes" or "rows".
    unit: ClassVar[str] = "bytes"
    # Files taken from a folder: those whose name ends so.
    suffix: ClassVar[str] = ""

    def __init__(self, config: DataConfig, part: Part):
        self.config = config
        self.part = part
        self.root, self.files = self.find()
        if not self.files:
            wanted = f"data.source={config.source} looks for *{self.suffix}"
            raise DataError(f"{part.key}: nothing to read in {self.root}; {wanted}")

    @property
    def total(self) -> int:
        """Size of everything in `unit`s."""
        return sum(file.stat().st_size for file in self.files)

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """All documents but the first `skip`, in order."""
        raise NotImplementedError

    def find(self) -> tuple[Path, list[Path]]:
        """The folder everything lies in, and the files under it in reading order."""
        key, path = self.part.key, self.part.path
        if not path:
            raise ConfigError(f"{key}: a file, a folder or a pattern is required for data.source={self.config.source}")
        whole = Path(path).expanduser()
        if whole.is_dir():
            return whole, walk(whole, self.suffix)
        if whole.exists():
            return whole.parent, [whole]
        found = sorted(Path(name) for name in glob.glob(str(whole), recursive=True) if os.path.isfile(name))
        if not found:
            raise DataError(
                f"{key}: {whole} does not exist; give a file, a folder or a pattern such as 'corpus/**/*.txt'"
            )
        return Path(os.path.commonpath([file.parent for file in found])), found

    def name(self, file: Path) -> str:
        """The file's name inside `root`, with forward slashes: it is the same on every machine."""
        return file.relative_to(self.root).as_posix()

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """`(name, bytes, mtime in ns)` of every file: tells whether finished shards are still those of the text."""
        stats = ((file, file.stat()) for file in self.files)
        return [(self.name(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    def row(self, name: str, text: object, units: float) -> RowDocument:
        """A document from one row. Equal texts always fall on the same side of the split."""
        if not isinstance(text, str):
            came = "nothing" if text is None else type(text).__name__
            raise DataError(
                f"{name}: field {self.config.text_field!r} holds {came}, not text; set data.text_field or repair it"
            )
        # A lone surrogate (JSON can write one) is no character; replacing is decided where bytes are checked.
        data = text.encode("utf-8", errors="surrogatepass")
        share = int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64
        return RowDocument(name, share < self.part.held_out, len(data), units, data)


def walk(root: Path, suffix: str, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Files under `root` that end in `suffix`, sorted by name; hidden ones and folders named in `skip` are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _cut(piece: bytes) -> int:
    """Where to cut a piece that is not the last: after the last line end, else before the last character."""
    line = piece.rfind(b"\n") + 1
    if line:
        return line
    last = len(piece) - 1
    while last > 0 and piece[last] & 0xC0 == 0x80:
        last -= 1
    return last or len(piece)
