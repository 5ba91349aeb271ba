"""Datatrove's token files: `NAME.ds` holds tokens, `NAME.ds.index` where documents end."""

from pathlib import Path

import numpy as np

from seqtrain.data.sources._tokens import TokenFile, TokenFiles
from seqtrain.errors import DataError


class TokenizedFile(TokenFile):
    """One file, as datatrove's pipeline/tokens/tokenizer.py writes it.

    `.index`: uint64, the number of tokens up to each document's end, which its own end token is part of. `.loss`, where
    there is one: a byte a token, 0 where it is not to be predicted.
    """

    def __init__(self, path: Path):
        _, self.index, self.loss = Datatrove.belonging(path)
        if not self.index.is_file() or self.index.stat().st_size % 8:
            raise DataError(f"{path}: {self.index.name} beside it must hold numbers of 8 bytes: where documents end")
        ends, size = np.fromfile(self.index, "<u8").astype(np.int64), path.stat().st_size
        tokens = int(ends[-1]) if len(ends) else 0
        # Written nowhere; two bytes where the vocabulary allows it.
        super().__init__(path, path, np.dtype("<u4" if tokens and size == 4 * tokens else "<u2"), tokens)
        if self.loss.is_file() and self.loss.stat().st_size != tokens:
            raise self.error(f"{self.loss.name} must have a byte for each of {tokens} tokens")
        self._ends = ends

    def find_starts(self) -> np.ndarray:
        return np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends

    def counted(self, start: int, stop: int) -> np.ndarray:
        if not self.loss.is_file() or start == stop:
            return super().counted(start, stop)
        return np.memmap(self.loss, "u1", "r", start, (stop - start,)) != 0


class Datatrove(TokenFiles):
    """`data.path`: a file, a folder (its `*.ds`) or a pattern; `data.tokenizer` made the ids."""

    suffix = ".ds"

    @classmethod
    def belonging(cls, file: Path) -> list[Path]:
        return [file, *(file.with_name(f"{file.name}.{ending}") for ending in ("index", "loss"))]

    @classmethod
    def open(cls, file: Path) -> TokenizedFile:
        return TokenizedFile(file)
