"""One split of a corpus as one long row of ids, whatever files it lies in."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from seqtrain.data.manifest import ShardIndex, SplitEntry
from seqtrain.data.shards import Shard
from seqtrain.data.tokenizer import Tokenizer

# Each open shard holds a file descriptor, of which a process may commonly have 1024.
OPEN_SHARDS = 64


class TokenStream:
    """One split as one long row of ids, its documents in order, each closed by the tokenizer's `end`."""

    def __init__(self, name: str, entry: SplitEntry, shards: ShardIndex, tokenizer: Tokenizer):
        self.name = name
        self.documents = entry.documents
        self.tokens = entry.tokens
        self.bytes = entry.bytes
        self.tokenizer = tokenizer
        # Text bytes for each byte counted from tokens: 1 unless the tokenizer normalises its text.
        self.byte_scale = entry.bytes / entry.token_bytes if entry.token_bytes else 1.0
        # Bytes of everything that is predicted: all but the first token of each document.
        self.predicted_bytes = (entry.token_bytes - entry.first_bytes) * self.byte_scale
        self.shards = shards
        # By number, the newest: opened when first read.
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 `[stop - start]`: the ids at `start <= position < stop`, which must lie in the stream.

        Raises `DataError` for a shard that is missing or damaged.
        """
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        parts = [self._opened(number).ids()[low:high] for number, low, high in self._pieces(start, stop)]
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions `start <= position < stop` at which a document starts, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for number, low, high in self._pieces(start, stop):
            starts = self._opened(number).starts()
            first, last = np.searchsorted(starts, [low, high])
            found.append(starts[first:last] + self.shards.first(number))
        return np.concatenate(found)

    def counted(self, start: int, stop: int) -> np.ndarray:
        """bool `[stop - start]`: whether the tokens at `start <= position < stop` are predicted; all are of text."""
        found = [self._opened(number).counted(low, high) for number, low, high in self._pieces(start, stop)]
        return np.concatenate(found) if found else np.empty(0, dtype=bool)

    def document_starts(self, first: int, stop: int) -> np.ndarray:
        """int64 `[stop - first]`: the positions at which the documents `first <= number < stop` start, rising."""
        assert 0 <= first <= stop <= self.documents, (first, stop, self.documents)
        found = [np.empty(0, dtype=np.int64)]
        while first < stop:
            number = self.shards.find_document(first)
            base, last = self.shards.first_document(number), min(stop, self.shards.first_document(number + 1))
            found.append(self._opened(number).starts()[first - base : last - base] + self.shards.first(number))
            first = last
        return np.concatenate(found)

    def _open(self, number: int) -> Shard:
        self.shards.touched.add(number)
        return self.shards.shard(number)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """`(shard, from, to)`, counted inside the shard, for every shard that `start` to `stop` touches."""
        number = self.shards.find(start)
        while start < stop and number < len(self.shards):
            base = self.shards.first(number)
            end = min(stop, self.shards.first(number + 1))
            yield number, start - base, end - base
            start = end
            number += 1
