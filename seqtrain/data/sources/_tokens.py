"""What every kind of token file is: ids on disk, and where documents start in them."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from seqtrain.data.sources._base import Document, Source
from seqtrain.errors import DataError


class TokenFile:
    """One file of ids, read through memory maps. `path`: the file that was found; `data`: that of the ids."""

    def __init__(self, path: Path, data: Path, dtype: np.dtype, tokens: int):
        self.path, self.data, self.dtype, self.tokens = path, data, dtype, tokens
        if not data.is_file() or data.stat().st_size != tokens * dtype.itemsize:
            came = f"{data.stat().st_size} bytes" if data.is_file() else "missing"
            raise self.error(f"{data.name} must have {tokens} ids of {dtype.itemsize} bytes, but is {came}")

    def ids(self) -> np.ndarray:
        """A new map of the ids: integers `[tokens]`."""
        return np.memmap(self.data, self.dtype, "r", shape=(self.tokens,)) if self.tokens else np.empty(0, self.dtype)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64: where documents that are not empty start, rising."""
        starts = np.unique(self.find_starts())
        if len(starts) and not 0 == starts[0] <= starts[-1] <= self.tokens:
            raise self.error("its documents do not lie one after the other in the tokens")
        return starts[starts < self.tokens]

    def find_starts(self) -> np.ndarray:
        """int64: where documents start; those that are empty, where the next does."""
        raise NotImplementedError

    def counted(self, start: int, stop: int) -> np.ndarray:
        """bool `[stop - start]`: whether those tokens are predicted."""
        return np.ones(stop - start, dtype=bool)

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.path}: {reason}")


class TokenFiles(Source):
    """Base of the sources whose files hold tokens: they are read in place, and nothing is tokenized.

    Whole documents at the end of all files are held out.
    """

    def fingerprint(self) -> list[tuple[str, int, int]]:
        others = [other for file in self.files for other in self.belonging(file) if other != file]
        stats = [(other.name, other.stat()) for other in others if other.is_file()]
        return [*super().fingerprint(), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]

    @classmethod
    def belonging(cls, file: Path) -> list[Path]:
        """The files that hold what is read of one, itself among them; not all need be there."""
        raise NotImplementedError

    @classmethod
    def open(cls, file: Path) -> TokenFile:
        """The tokens of one of the files. Raises `DataError`."""
        raise NotImplementedError

    def documents_of(self, file: Path, start: object) -> Iterator[Document]:
        raise DataError(f"{file}: holds tokens, which are read in place")
