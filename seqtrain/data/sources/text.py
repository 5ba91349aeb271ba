"""Plain text files: every file is one document."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqtrain.data.config import DataConfig
from seqtrain.data.sources._base import PIECE_BYTES, Document, Part, Source
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

    def documents(self, skip: int = 0) -> Iterator[Document]:
        if len(self.files) == 1 and 0 < self.part.held_out < 1:
            yield from self._halves(self.files[0])[skip:]
            return
        for file in self.files[skip:]:
            name, size = self.name(file), file.stat().st_size
            yield FileDocument(str(file), name in self._held_out_names, size, size, file)

    def _halves(self, file: Path) -> list[FileDocument]:
        size = file.stat().st_size
        cut = self._tail(file, size)
        return [
            FileDocument(str(file), False, cut, cut, file),
            FileDocument(f"{file} from byte {cut}", True, size - cut, size - cut, file, cut),
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

    def _tail(self, file: Path, size: int) -> int:
        """The byte at which the held-out tail starts: the first line end after the wanted place, or that place."""
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
