"""Tokens that an encoder is asked for, in place of the next one (BERT, Devlin et al. 2018, arXiv 1810.04805)."""

from dataclasses import dataclass

import numpy as np

# Of the tokens asked for, the shares that the mask stands for, and any token; the rest are left as they are.
MASKED, REPLACED = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """Which tokens of a row are asked for follows from the seed, the row's number and each one's place in the text.

    `share`: of the tokens. `mask`: the id that stands for one; those below it are tokens.
    """

    share: float
    mask: int
    seed: int

    def asked(self, ids: np.ndarray, first: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and whether each is asked for: `ids`, int64 `[n]`, lie at `first` and after, in row `number`."""
        place = np.arange(first, first + len(ids), dtype=np.uint64)
        chosen = self._draw(place, number, 0) < self.share
        kind, other = self._draw(place, number, 1), (self._draw(place, number, 2) * self.mask).astype(np.int64)
        shown = np.where(kind < MASKED, self.mask, np.where(kind < MASKED + REPLACED, other, ids))
        return np.where(chosen, shown, ids), chosen

    def _draw(self, place: np.ndarray, number: int, salt: int) -> np.ndarray:
        """Uniform in [0, 1), float64: SplitMix64 of the numbers one after the other."""
        state = np.zeros_like(place)
        for part in (self.seed, number, salt, place):
            state = _mixed(state + np.asarray(part, dtype=np.uint64))
        return (state >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele, Lea and Flood 2014), modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
