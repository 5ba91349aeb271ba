"""Plain text files: every file is one document."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from seqtrain.data.config import DataConfig
from seqtrain.data.sources._base import PIECE_BYTES, START, Cursor, Document, Ends, Part, Place, Source
from seqtrain.errors import DataError


@dataclass(frozen=True)
class FileDocument(Document):
    """A stretch of a file, from byte `start` on; it is read as it is needed."""

    path: Path
    start: int = 0

    def read(self, offset: int, count: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.start + offset)
                return file.read(count)
        except OSError as error:
            raise DataError(f"{self.name}: can't be read at byte {self.start + offset} ({error.strerror})") from None


class TextFiles(Source):
    """`data.path`: a file, a folder (every file in it that is not hidden) or a pattern.

    Whole files are held out, so that no file is on both sides: those whose names have the smallest hashes, as long as
    they fit into the share, and one at least. A single file is cut in two at a line end; its tail is held out.
    """

    def __init__(self, config: DataConfig, part: Part):
        super().__init__(config, part)
        self._held_out_names = self._choose()
        # A single file: where its held-out tail begins; -1 where whole files are held out.
        self._cut = self._tail(self.files[0]) if len(self.files) == 1 and 0 < part.held_out < 1 else -1

    def documents(self, start: Place = START) -> Iterator[Document]:
        if self._cut >= 0:
            yield from (document for document in self._halves(self.files[0]) if document.place >= start)
            return
        for number, file in self.numbered(start.file):
            name, size = self.name(file), file.stat().st_size
            held_out = name in self._held_out_names
            yield FileDocument(str(file), held_out, size, size, Place(number), Place(number + 1), file)

    def stretches(self, size: int, ends: Ends) -> Iterator[tuple[Cursor, int]]:
        for document in self.documents():
            offset, previous = 0, -1
            for near in range(size, document.size - size // 2, size):
                if (cut := document.cut(near, ends)) >= document.size:
                    break
                yield Cursor(0, document.place, offset, previous), cut - offset
                offset, previous = cut, document.read(cut - 1, 1)[0]
            yield Cursor(0, document.place, offset, previous), document.size - offset

    def between(self, first: int, last: int) -> Self:
        part = super().between(first, last)
        part._held_out_names = self._held_out_names & {self.name(file) for file in part.files}
        return part

    def _halves(self, file: Path) -> list[FileDocument]:
        size, cut = file.stat().st_size, self._cut
        tail = f"{file} from byte {cut}"
        return [
            FileDocument(str(file), False, cut, cut, Place(), Place(0, cut), file),
            FileDocument(tail, True, size - cut, size - cut, Place(0, cut), Place(1), file, cut),
        ]

    def _choose(self) -> frozenset[str]:
        sizes = {self.name(file): file.stat().st_size for file in self.files}
        if self.part.held_out >= 1:
            return frozenset(sizes)
        filled = sorted(
            (name for name in sizes if sizes[name]), key=lambda name: hashlib.sha256(os.fsencode(name)).digest()
        )
        if self.part.held_out == 0 or len(filled) < 2:
            return frozenset()
        room = self.part.held_out * sum(sizes.values())
        chosen = set()
        for name in filled:
            if sizes[name] <= room:
                chosen.add(name)
                room -= sizes[name]
        return frozenset(chosen or {min(filled, key=lambda name: sizes[name])})

    def _tail(self, file: Path) -> int:
        """The byte at which the held-out tail starts: the first line end after the wanted place, or that place."""
        size = file.stat().st_size
        wanted = int(size * (1 - self.part.held_out))
        with file.open("rb") as opened:
            opened.seek(wanted)
            ahead = opened.read(PIECE_BYTES)
        line = ahead.find(b"\n") + 1
        if line and wanted + line < size:
            return wanted + line
        # No line ends there: at least do not cut a character in two.
        inside = next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)
        return wanted + inside
