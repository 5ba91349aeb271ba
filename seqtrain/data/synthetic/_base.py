"""What every synthetic task is: a rule that draws rows of tokens with the exact answer wherever one is asked for."""

import hashlib
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.batches import IGNORED
from seqtrain.errors import ConfigError

Split = Literal["train", "held_out"]


class Task:
    """Base of the tasks. A subclass lives in a file named after it, with a frozen dataclass `Config` inside.

    A row is whatever number of tokens is asked for, so the same task can be asked at a length it was not trained at.
    """

    Config: ClassVar[type]
    # Ids of tokens and labels are below it.
    vocab_size: int
    # The share of right answers that guessing among all possible ones gives.
    chance: float
    # The fewest tokens in a row.
    shortest = 1

    def __init__(self, config: Any):
        self.config = config

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens, labels)`, int64 `[length]` each: a label is the answer at its token, -100 where nothing is asked.

        Uses no randomness but `draw`'s, and so is the same for the same state of it. `length >= shortest`.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The task's file."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, length: int) -> None:
        """Raises `ConfigError` if a row of `length` tokens can't hold the task."""
        if length < self.shortest:
            raise ConfigError(
                f"train.sequence_length={length}: data.source={self.name} with these data.task settings needs "
                f"at least {self.shortest} tokens per row"
            )

    def config_error(self, field: str, rule: str) -> ConfigError:
        """The error for a field of `data.task`: `data.task.pairs=600: <rule>`."""
        return ConfigError(f"data.task.{field}={vars(self.config)[field]}: {rule}")


def examples(
    task: Task, *, length: int, seed: int, first: int, count: int, split: Split = "train"
) -> tuple[Tensor, Tensor]:
    """Rows `first` to `first + count - 1` of a split: `(tokens, labels)`, int64 `[count, length]`.

    Row `index` follows from `(split, seed, index, length)` alone, whichever rows are drawn with it. The splits' random
    streams differ for every seed. Raises `ConfigError` for a length too short.
    """
    task.check(length)
    rows = [task.example(length, stream(split, seed, index)) for index in range(first, first + count)]
    tokens, labels = (np.stack(part) for part in zip(*rows, strict=True))
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def stream(split: Split, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one row."""
    digest = hashlib.sha256(f"{split}/{seed}/{index}".encode()).digest()
    # Counter based: starting one costs no mixing rounds. A key of 128 bits: no two rows of any runs share a stream.
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16])))


def nothing_asked(length: int) -> np.ndarray:
    """Labels of a row in which nothing is asked, int64 `[length]`."""
    return np.full(length, IGNORED, dtype=np.int64)
