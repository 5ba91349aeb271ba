"""Megatron's indexed datasets: `PREFIX.bin` holds tokens, `PREFIX.idx` where documents start in it."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from seqtrain.data.config import DataConfig
from seqtrain.data.sources._base import Part
from seqtrain.data.sources._tokens import TokenFile, TokenFiles
from seqtrain.errors import DataError

# The index as Megatron-LM's megatron/core/datasets/indexed_dataset.py writes it: magic, version, code of the ids' type,
# sequences, documents + 1; then int32 lengths and int64 byte offsets of sequences, and int64 numbers of the sequences
# with which documents begin, the last of them the number of all.
MAGIC, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class IndexedFile(TokenFile):
    """One pair of files."""

    def __init__(self, path: Path):
        with path.open("rb") as opened:
            head = opened.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise DataError(f"{path}: not an index of Megatron's: it starts with {head[:9]!r}")
        _, version, code, self.sequences, self.documents = HEADER.unpack(head)
        if version != 1 or code not in TYPES:
            raise DataError(f"{path}: version {version} with ids of type {code}; known are 1 with {sorted(TYPES)}")
        least = HEADER.size + 12 * self.sequences + 8 * self.documents
        if (size := path.stat().st_size) < least:
            raise DataError(f"{path}: cut off: {size} bytes, at least {least} for {self.sequences} sequences")
        self.path = path
        lengths, offsets, _ = self._maps()
        dtype = np.dtype(TYPES[code])
        ends = np.cumsum(lengths, dtype=np.int64)
        if self.sequences and ((offsets[0], offsets[-1]) != (0, (ends[-1] - lengths[-1]) * dtype.itemsize)):
            raise DataError(f"{path}: its sequences do not lie one after the other in the .bin; merge them anew")
        super().__init__(path, path.with_suffix(".bin"), dtype, int(ends[-1]) if self.sequences else 0)

    def find_starts(self) -> np.ndarray:
        _, offsets, documents = self._maps()
        firsts = documents[:-1]
        return np.asarray(offsets[firsts[firsts < self.sequences]]) // self.dtype.itemsize

    def _maps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths and offsets of sequences, and the sequences with which documents begin."""
        found, place = [], HEADER.size
        for kind, count in (("<i4", self.sequences), ("<i8", self.sequences), ("<i8", self.documents)):
            found.append(np.memmap(self.path, kind, "r", place, (count,)) if count else np.empty(0, kind))
            place += count * np.dtype(kind).itemsize
        return found[0], found[1], found[2]


class Megatron(TokenFiles):
    """`data.path`: a prefix, a folder (its `*.idx`) or a pattern of prefixes; `data.tokenizer` made the ids."""

    suffix = ".idx"

    def __init__(self, config: DataConfig, part: Part):
        path = part.path.removesuffix(".bin").removesuffix(".idx")
        found = not path or Path(path).expanduser().is_dir()
        super().__init__(config, part if found else replace(part, path=f"{path}.idx"))

    @classmethod
    def belonging(cls, file: Path) -> list[Path]:
        return [file, file.with_suffix(".bin")]

    @classmethod
    def open(cls, file: Path) -> IndexedFile:
        return IndexedFile(file)
