"""Lines of JSON: every line is one object, and one document."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from seqtrain.data.sources._base import START, Cursor, Document, Ends, Place, Source, within
from seqtrain.data.sources._compressed import ENDINGS, compression, opened
from seqtrain.errors import DataError

# A line is parsed whole, so its length bounds the memory used.
LONGEST_LINE = 2**28
# Bytes decompressed in one go on the way to a place.
SKIPPED = 2**20


class JsonLines(Source):
    """`data.path`: a file, a folder (its `*.jsonl`) or a pattern; the text is the field `data.text_field`.

    Files may be compressed: gzip, zstd, xz. Blank lines are passed over. Lines are held out by a hash of their text.
    """

    suffix = tuple(f".jsonl{ending}" for ending in ENDINGS)

    def documents(self, start: Place = START) -> Iterator[Document]:
        for number, file in self.numbered(start.file):
            with opened(file) as (text, raw):
                begun = at = start.at if number == start.file else 0
                _enter(text, raw, at)
                read = raw.tell()
                for count in itertools.count(1):
                    if not (line := text.readline(LONGEST_LINE + 1)):
                        break
                    place, at = Place(number, at), at + len(line)
                    if not line.strip():
                        continue
                    # How many lines come before isn't known where the file is entered in the middle.
                    name = f"{file}: byte {place.at}" if begun else f"{file}:{count}"
                    # Of a compressed file, as much as has been read of it; that of a line isn't known.
                    units = len(line) if text is raw else raw.tell() - read
                    read += units
                    yield self._parse(name, line, units, place, Place(number, at))

    def stretches(self, size: int, ends: Ends) -> Iterator[tuple[Cursor, int]]:
        for (cursor, whole), (number, file) in zip(super().stretches(size, ends), self.numbered(), strict=True):
            at = 0
            for cut in _line_starts(file, range(size, whole - size // 2, size)):
                if at < cut < whole:
                    yield cursor._replace(place=Place(number, at)), cut - at
                    at = cut
            yield cursor._replace(place=Place(number, at)), whole - at

    def _parse(self, name: str, line: bytes, units: int, place: Place, next_place: Place) -> Document:
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{name}: the line is longer than {LONGEST_LINE} bytes; keep so long a document as a text file"
            )
        try:
            # Numbers are not looked at, however long they are.
            entry = json.loads(line, parse_int=len)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: not a line of JSON: {error}") from None
        text = within(entry, self.config.text_field, f"{name}: the line")
        return self.row(name, text, units, place, next_place)


def _enter(text: IO[bytes], raw: IO[bytes], at: int) -> None:
    """Goes to byte `at` of the text; what is compressed is read up to there."""
    if text is raw:
        raw.seek(at)
    while text is not raw and at > 0:
        at -= len(text.read(min(at, SKIPPED))) or at


def _line_starts(file: Path, places: range) -> Iterator[int]:
    """The first line that begins at or after each of `places`; none of a compressed file, which has no places."""
    with file.open("rb") as opened:
        if compression(opened.read(8)):
            return
        for place in places:
            opened.seek(place - 1)
            opened.readline(LONGEST_LINE)
            yield opened.tell()
