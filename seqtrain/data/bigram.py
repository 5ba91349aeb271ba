"""The byte-bigram baseline: bits per byte of a model that sees only the previous byte."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seqtrain.data.corpus import Corpus

# Counts are [256, 257]: by the byte before, and the byte that follows or, as 256, the document's end.
SHAPE = (256, 257)
END = 256
# No byte and no end: between two texts of which the second does not follow on the first.
BREAK = 257
# Added to every count. On the standard library 0.001 to 1 moves the result by 0.002 bits; this is near the best.
SMOOTHING = 0.1


class BigramCounter:
    """Counts byte pairs of texts that come in pieces. `counts`: int64 `[256, 257]`."""

    def __init__(self, counts: np.ndarray | None = None):
        self.counts = np.zeros(SHAPE, dtype=np.int64) if counts is None else counts

    def add(self, pieces: list[tuple[bytes, int, bool]]) -> None:
        """Counts `(text, byte before it or -1, whether the document ends after it)` for every piece."""
        symbols = np.concatenate(list(_symbols(pieces)))
        before, after = symbols[:-1], symbols[1:]
        pairs = (before < 256) & (after <= END)
        found = before[pairs].astype(np.int64) * SHAPE[1] + after[pairs]
        self.counts += np.bincount(found, minlength=self.counts.size).reshape(SHAPE)


def bigram_bits_per_byte(corpus: "Corpus", *, smoothing: float = SMOOTHING) -> float:
    """Bits a byte of the held-out text costs under a byte-bigram model fitted on the training text.

    `p(next | byte) = (count(byte, next) + smoothing) / (count(byte) + 257 * smoothing)`, where `next` is a byte or
    the end of the document. The same rule as for a model: a document's first byte is given, not predicted; its end is
    predicted, and stands for no byte. Costs nothing but this sum: the pairs were counted when the text was tokenized,
    whatever the tokenizer. Not a number if nothing is held out.
    """
    train, held_out = read_counts(corpus.bigrams)
    probability = (train + smoothing) / (train.sum(1, keepdims=True) + SHAPE[1] * smoothing)
    predicted_bytes = held_out[:, :END].sum()
    if predicted_bytes == 0:
        return float("nan")
    return float(-(held_out * np.log2(probability)).sum() / predicted_bytes)


def read_counts(file: Path) -> np.ndarray:
    """int64 `[2, 256, 257]`: counts of the training text and of the held-out text."""
    return np.load(file, allow_pickle=False)


def _symbols(pieces: list[tuple[bytes, int, bool]]) -> Iterator[np.ndarray]:
    for text, previous, ends in pieces:
        if previous >= 0:
            yield np.array([previous], dtype=np.uint16)
        yield np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
        yield np.array([END if ends else BREAK], dtype=np.uint16)
