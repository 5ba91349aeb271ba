"""scikit-learn's handwritten digits (Alpaydin and Kaynak 1998) pixel by pixel: a small sequential image task."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from seqtrain.data.synthetic._base import Split, Task, nothing_asked
from seqtrain.errors import ConfigError

SIDE, SHADES = 8, 17
# Of so many images one is held out.
HELD_OUT = 5


class Digits(Task):
    """An image of 8 by 8 pixels row by row; at its last token the answer is the digit.

    1,797 images, of which every fifth is held out; a row shows one of its split's at random. Ids: the 17 shades, then
    the digits. Needs scikit-learn, whose wheel has them.
    """

    @dataclass(frozen=True)
    class Config:
        pass

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance, self.shortest = SHADES + 10, 0.1, SIDE**2

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.example_of("train", length, draw)

    def example_of(self, split: Split, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        images, digits = _images()
        held_out = np.arange(len(images)) % HELD_OUT == 0
        chosen = draw.choice(np.flatnonzero(held_out if split == "held_out" else ~held_out))
        tokens, labels = np.zeros(length, dtype=np.int64), nothing_asked(length)
        tokens[length - SIDE**2 :] = images[chosen]
        labels[-1] = SHADES + digits[chosen]
        return tokens, labels


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """All images, int64 `[n,64]`, and their digits. Raises `ConfigError`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        rule = "needs scikit-learn, which has them: pip install 'seqtrain[tasks]'"
        raise ConfigError(f"data.source=digits: {rule} ({error})") from error
    found = load_digits()
    return found.data.astype(np.int64), found.target.astype(np.int64)
