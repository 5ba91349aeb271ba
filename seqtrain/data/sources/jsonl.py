"""Lines of JSON: every line is one object, and one document."""

import json
from collections.abc import Iterator

from seqtrain.data.sources._base import Document, Source, within
from seqtrain.data.sources._compressed import ENDINGS, opened
from seqtrain.errors import DataError

# A line is parsed whole, so its length bounds the memory used.
LONGEST_LINE = 2**28


class JsonLines(Source):
    """`data.path`: a file, a folder (its `*.jsonl`) or a pattern; the text is the field `data.text_field`.

    Files may be compressed: gzip, zstd, xz. Blank lines are passed over. Lines are held out by a hash of their text.
    """

    suffix = tuple(f".jsonl{ending}" for ending in ENDINGS)

    def documents(self, skip: int = 0) -> Iterator[Document]:
        for file in self.files:
            with opened(file) as (text, raw):
                number = read = 0
                while line := text.readline(LONGEST_LINE + 1):
                    number += 1
                    if not line.strip():
                        continue
                    if skip:
                        skip, read = skip - 1, raw.tell()
                        continue
                    # Of a compressed file, as much as has been read of it; that of a line isn't known.
                    units = len(line) if text is raw else raw.tell() - read
                    read += units
                    yield self._parse(f"{file}:{number}", line, units)

    def _parse(self, name: str, line: bytes, units: int) -> Document:
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{name}: the line is longer than {LONGEST_LINE} bytes; keep so long a document as a text file"
            )
        try:
            # Numbers are not looked at, however long they are.
            entry = json.loads(line, parse_int=len)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: not a line of JSON: {error}") from None
        return self.row(name, within(entry, self.config.text_field, f"{name}: the line"), units)
