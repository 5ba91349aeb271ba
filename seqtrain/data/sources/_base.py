"""What every source of text is: an ordered list of documents that can be entered anywhere and read piece by piece."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from seqtrain.data.config import DataConfig
from seqtrain.data.sources._files import Found, ending, ending_in, matching, readable, some, walk
from seqtrain.errors import ConfigError, DataError

# Text is read and tokenized in pieces of at most this many bytes, so that no document decides the memory used.
PIECE_BYTES = 2**18
# Where no place fits, a piece is made longer, at most so many times as long.
LONGEST_PIECE = 16
# Line ends, spaces and characters that are tried as the end of a piece, from the last one on.
TRIED = {"lines": 16, "spaces": 32, "characters": 64}


# Bytes on either side of a place that are looked at to tell whether text may be cut there.
AROUND = 1024

Ends = Callable[[bytes, bytes], bool]


@dataclass(frozen=True)
class Part:
    """What one source reads: `path` (file, folder or pattern), the config key it came from, the share held out."""

    key: str
    path: str
    held_out: float


class Place(NamedTuple):
    """Where a document begins: in which of a source's files, and at which byte or row of it."""

    file: int = 0
    at: int = 0


START = Place()


class Cursor(NamedTuple):
    """Where reading goes on: `offset` bytes into the document at `place` of source `part`.

    `part`: 0 `data.path`, 1 `data.held_out_path`. `previous`: the byte before, or -1 at a document's start.
    """

    part: int = 0
    place: Place = START
    offset: int = 0
    previous: int = -1


@dataclass(frozen=True)
class Document:
    """One text, read by byte offset. `units` is its share of `Source.total`, for the progress bar.

    `place`: where it begins; `next_place`: where whoever has read it goes on.
    """

    name: str
    held_out: bool
    size: int
    units: float
    place: Place
    next_place: Place
    # Of a conversation, the characters that are predicted, `start <= place < stop`; None: all are.
    learned: tuple[tuple[int, int], ...] | None = field(default=None, kw_only=True)
    # What of it is left out, by reason, with a remark.
    problems: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes of the text from `offset`."""
        raise NotImplementedError

    def pieces(
        self, offset: int = 0, stop: int | None = None, *, ends: Ends = lambda before, after: True
    ) -> Iterator[tuple[bytes, int]]:
        """`(bytes, offset after them)` from `offset` on: cut at line ends where possible, never in a character.

        `stop`: where the last one ends, by default at the text's end. `ends(before, after)`: whether text may be cut
        between two stretches of it. Where nothing within `LONGEST_PIECE` pieces may be cut, as within a token repeated
        over megabytes, raises `DataError`.
        """
        stop = self.size if stop is None else stop
        if self.learned is not None and offset < stop:
            # Its marks are no text that could be cut anywhere.
            yield self.read(offset, stop - offset), stop
            return
        while offset < stop:
            piece = self._piece(offset, stop, ends)
            if not piece:
                raise DataError(
                    f"{self.name}: ends at byte {offset} of {self.size}; it changed while it was read; rerun"
                )
            offset += len(piece)
            yield piece, offset

    def cut(self, offset: int, ends: Ends) -> int:
        """The end of the piece that begins at the first character from `offset` on: text may be cut there, too."""
        start = self.read(offset, 4)
        offset += next((place for place, byte in enumerate(start) if byte & 0xC0 != 0x80), len(start))
        return offset + len(self._piece(offset, self.size, ends))

    def _piece(self, offset: int, stop: int, ends: Ends) -> bytes:
        left = stop - offset
        size = PIECE_BYTES
        while size < min(left, LONGEST_PIECE * PIECE_BYTES):
            data = self.read(offset, size + AROUND)
            piece = data[:size]
            for place in _places(piece):
                if ends(piece[max(0, place - AROUND) : place], data[place : place + AROUND]):
                    return piece[:place]
            size *= 2
        piece = self.read(offset, min(left, size))
        if size <= len(piece) < left:
            raise DataError(
                f"{self.name}: in {size} bytes from byte {offset} on no place was found where a token ends wherever "
                "the text is cut, as in a run of one letter; break that run, or use data.tokenizer=bytes"
            )
        return piece


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
    # Files taken from a folder: those whose name ends so, or in one of these ways.
    suffix: ClassVar[str | tuple[str, ...]] = ""

    def __init__(self, config: DataConfig, part: Part):
        self.config = config
        self.part = part
        self.root, found = self.find()
        self.files, self.left_out = found.files, found.left_out
        # The number of the first of `files` among those there are.
        self.first_file = 0
        if not self.files:
            wanted = f"data.source={config.source} looks for {ending(self.suffix)}"
            raise DataError(f"{part.key}: nothing to read in {self.root}{self.passed_over}; {wanted}")
        if closed := [file for file in self.files if not os.access(file, os.R_OK)]:
            where = readable(str(closed[0].parent))
            raise DataError(f"{part.key}: no permission to read {len(closed)} files: {some(closed)} in {where}")

    @property
    def total(self) -> int:
        """Size of everything in `unit`s."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def passed_over(self) -> str:
        """What is not read of `data.path`, and why, to be added to a sentence; empty where all is read."""
        told = [f"{len(paths)} {reason} ({some(paths)})" for reason, paths in sorted(self.left_out.items())]
        return f", left out: {'; '.join(told)}" if told else ""

    def documents(self, start: Place = START) -> Iterator[Document]:
        """The documents from that at `start` on, in order."""
        for number, file in self.numbered(start.file):
            yield from self.documents_of(file, Place(number, start.at if number == start.file else 0))

    def documents_of(self, file: Path, start: Place) -> Iterator[Document]:
        """Those of one file."""
        raise NotImplementedError

    def stretches(self, size: int, ends: Ends) -> Iterator[tuple[Cursor, int]]:
        """Where reading may begin, in order, and how many bytes follow up to the next.

        Sources that can be entered within a file give places about `size` bytes apart. `ends`: as in `pieces`.
        """
        for number, file in self.numbered():
            for place, length in self.stretches_of(file, Place(number), size):
                yield Cursor(place=place), length

    def stretches_of(self, file: Path, start: Place, size: int) -> Iterator[tuple[Place, int]]:
        """Those of one file, which begins at `start`: it is one."""
        yield start, file.stat().st_size

    def numbered(self, first: int = 0) -> Iterator[tuple[int, Path]]:
        """The files from number `first` on, with their numbers."""
        skipped = max(first - self.first_file, 0)
        return enumerate(self.files[skipped:], self.first_file + skipped)

    def between(self, first: int, last: int) -> Self:
        """The same source knowing of its files `first` to `last` only, as one sends it to another process."""
        part = copy.copy(self)
        part.left_out = {}
        part.files, part.first_file = self.files[first - self.first_file : last + 1 - self.first_file], first
        return part

    def find(self) -> tuple[Path, Found]:
        """The folder everything lies in, and what is found in it."""
        key, path = self.part.key, self.part.path
        if not path:
            raise ConfigError(f"{key}: a file, a folder or a pattern is required for data.source={self.config.source}")
        whole = Path(path).expanduser()
        if whole.is_dir():
            return whole, walk(whole, ending_in(self.suffix))
        if os.path.isfile(whole):
            return whole.parent, Found([whole])
        if os.path.exists(whole):
            raise DataError(f"{key}: {whole} is neither a file nor a folder")
        found = matching(str(whole))
        if not found.files:
            raise DataError(
                f"{key}: {whole} does not exist; give a file, a folder or a pattern such as 'corpus/**/*.txt'"
            )
        return Path(os.path.commonpath([file.parent for file in found.files])), found

    def name(self, file: Path) -> str:
        """The file's name inside `root`, with forward slashes: it is the same on every machine."""
        return file.relative_to(self.root).as_posix()

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """`(name, bytes, mtime in ns)` of every file: tells whether finished shards are still those of the text."""
        stats = ((file, file.stat()) for file in self.files)
        return [(self.name(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    @property
    def settings(self) -> list[object]:
        """What decides its text besides files and the keys that all sources have: JSON."""
        return []

    def row(self, name: str, text: object, units: float, place: Place, next_place: Place) -> RowDocument:
        """A document from one row. Equal texts always fall on the same side of the split."""
        if not isinstance(text, str):
            came = "nothing" if text is None else type(text).__name__
            raise DataError(
                f"{name}: field {self.config.text_field!r} holds {came}, not text; set data.text_field or repair it"
            )
        # A lone surrogate (JSON can write one) is no character; replacing is decided where bytes are checked.
        data = text.encode("utf-8", errors="surrogatepass")
        share = int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64
        return RowDocument(name, share < self.part.held_out, len(data), units, place, next_place, data)


def within(entry: object, path: str, where: str) -> object:
    """What the row `entry` holds at `path`: a field's name, or names of fields and places in lists joined by dots.

    Raises `DataError` for a field that isn't there; `where`: the row, as in `FILE:7: the line`.
    """
    if isinstance(entry, dict) and path in entry:
        return entry[path]
    name, _, holder = where.rpartition(": ")
    for part in path.split("."):
        if isinstance(entry, list) and part.isdecimal() and int(part) < len(entry):
            entry = entry[int(part)]
        elif isinstance(entry, dict) and part in entry:
            entry = entry[part]
        else:
            came = f"fields {sorted(entry)[:8]}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
            raise DataError(f"{name}: no field {path!r}, {holder} holds {came}; set data.text_field")
        holder = part
    return entry


def _places(piece: bytes) -> Iterator[int]:
    """Where to cut a piece, likely places first: around line ends, at spaces, between characters, the last ones."""
    for kind, marks in (("lines", b"\n"), ("spaces", b" ")):
        place = len(piece)
        for _ in range(TRIED[kind]):
            place = piece.rfind(marks, 0, place)
            if place < 0:
                break
            if marks == b"\n":
                yield place + 1
            if place:
                yield place
    characters = (place for place in range(len(piece) - 1, 0, -1) if piece[place] & 0xC0 != 0x80)
    yield from list(islice(characters, TRIED["characters"])) or [len(piece)]
