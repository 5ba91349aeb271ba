"""The byte-bigram baseline: bits per byte of a model that sees only the previous byte."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seqtrain.data.corpus import Corpus
    from seqtrain.data.mixture import Mixture
    from seqtrain.data.synthetic import SyntheticCorpus

# Counts are [256, 257]: by the byte before, and the byte that follows or, as 256, the document's end.
SHAPE = (256, 257)
END = 256
# No byte and no end: between two texts of which the second does not follow on the first.
BREAK = 257
# Added to every count. On the standard library 0.001 to 1 moves the result by 0.002 bits; this is near the best.
SMOOTHING = 0.1


def count_pairs(pieces: list[tuple[bytes, int, bool]]) -> np.ndarray:
    """int64 `[256, 257]`: byte pairs of pieces `(text, byte before it or -1, whether the document ends after it)`."""
    symbols: list[np.ndarray] = []
    for text, previous, ends in pieces:
        before = [previous] if previous >= 0 else []
        after = [END if ends else BREAK]
        symbols += [np.array(before, np.uint16), np.frombuffer(text, np.uint8), np.array(after, np.uint16)]
    row = np.concatenate(symbols, dtype=np.uint16)
    first, second = row[:-1], row[1:]
    pairs = (first < 256) & (second <= END)
    found = first[pairs].astype(np.int64) * SHAPE[1] + second[pairs]
    return np.bincount(found, minlength=SHAPE[0] * SHAPE[1]).reshape(SHAPE)


def bigram_bits_per_byte(corpus: "Corpus | SyntheticCorpus | Mixture", *, smoothing: float = SMOOTHING) -> float:
    """Bits a byte of the held-out text costs under a byte-bigram model fitted on the training text.

    `p(next | byte) = (count(byte, next) + smoothing) / (count(byte) + 257 * smoothing)`, where `next` is a byte or
    the end of the document. The same rule as for a model: a document's first byte is given, not predicted; its end is
    predicted, and stands for no byte. Costs nothing but this sum: the pairs were counted when the text was tokenized,
    whatever the tokenizer. Of a mixture, all its text counts alike. Not a number if nothing is held out, or
    for tokens that are read in place: their text was not seen.
    """
    if not all(part.manifest.bigrams_sha256 for part in corpus.texts.values()):
        return float("nan")
    counts = [read_counts(part.bigrams) for part in corpus.texts.values()]
    train, held_out = np.sum(counts, axis=0) if counts else np.zeros((2, *SHAPE))
    probability = (train + smoothing) / (train.sum(1, keepdims=True) + SHAPE[1] * smoothing)
    predicted_bytes = held_out[:, :END].sum()
    if predicted_bytes == 0:
        return float("nan")
    return float(-(held_out * np.log2(probability)).sum() / predicted_bytes)


def read_counts(file: Path) -> np.ndarray:
    """int64 `[2, 256, 257]`: counts of the training text and of the held-out text."""
    return np.load(file, allow_pickle=False)
