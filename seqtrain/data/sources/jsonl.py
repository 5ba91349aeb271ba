"""Lines of JSON: every line is one object, and one document."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from seqtrain.data.sources._base import Document, Place, Source, within
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

    def documents_of(self, file: Path, start: Place) -> Iterator[Document]:
        with opened(file) as (text, raw):
            number, at = start
            _enter(text, raw, at)
            read = raw.tell()
            for count in itertools.count(1):
                if not (line := text.readline(LONGEST_LINE + 1)):
                    break
                place, at = Place(number, at), at + len(line)
                if not line.strip():
                    continue
                # How many lines come before isn't known where the file is entered in the middle.
                name = f"{file}: byte {place.at}" if start.at else f"{file}:{count}"
                # Of a compressed file, as much as has been read of it; that of a line isn't known.
                units = len(line) if text is raw else raw.tell() - read
                read += units
                yield self._parse(name, line, units, place, Place(number, at))

    def stretches_of(self, file: Path, start: Place, size: int) -> Iterator[tuple[Place, int]]:
        whole = file.stat().st_size
        for cut in _line_starts(file, range(size, whole - size // 2, size)):
            if start.at < cut < whole:
                yield start, cut - start.at
                start = start._replace(at=cut)
        yield start, whole - start.at

    def _parse(self, name: str, line: bytes, units: int, place: Place, next_place: Place) -> Document:
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{name}: the line is longer than {LONGEST_LINE} bytes; keep so long a document as a text file"
            )
        try:
            return self.document(name, self.loads(line), units, place, next_place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: not a line of JSON: {error}") from None

    def loads(self, line: bytes) -> object:
        """The object in a line."""
        # Numbers are not looked at, however long they are.
        return json.loads(line, parse_int=len)

    def document(self, name: str, entry: object, units: float, place: Place, next_place: Place) -> Document:
        """The document in the object of a line."""
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
