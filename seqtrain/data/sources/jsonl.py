"""Lines of JSON: every line is one object, and one document."""

import json
from collections.abc import Iterator

from seqtrain.data.sources._base import Document, Source
from seqtrain.errors import DataError

# A line is parsed whole, so its length bounds the memory used.
LONGEST_LINE = 2**28


class JsonLines(Source):
    """`data.path`: a file, a folder (its `*.jsonl`) or a pattern; the text is the field `data.text_field`.

    Blank lines are passed over. Lines are held out by a hash of their text.
    """

    suffix = ".jsonl"

    def documents(self, skip: int = 0) -> Iterator[Document]:
        for file in self.files:
            with file.open("rb") as opened:
                number = 0
                while line := opened.readline(LONGEST_LINE + 1):
                    number += 1
                    if not line.strip():
                        continue
                    if skip:
                        skip -= 1
                        continue
                    yield self._parse(f"{file}:{number}", line)

    def _parse(self, name: str, line: bytes) -> Document:
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{name}: the line is longer than {LONGEST_LINE} bytes; keep so long a document as a text file"
            )
        try:
            # Numbers are not looked at, however long they are.
            entry = json.loads(line, parse_int=len)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: not a line of JSON: {error}") from None
        field = self.config.text_field
        if not isinstance(entry, dict) or field not in entry:
            came = f"fields {sorted(entry)[:8]}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
            raise DataError(f"{name}: no field {field!r}, the line holds {came}; set data.text_field")
        return self.row(name, entry[field], len(line))
