"""What every synthetic task is: a rule that draws rows of tokens with the exact answer wherever one is asked for.

In the place of a corpus it draws rows when a batch is asked for, and keeps none.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from seqtrain.data.batches import IGNORED, Batch, Layout, Row, RowBatches
from seqtrain.data.config import DataConfig
from seqtrain.data.packing import Span
from seqtrain.errors import ConfigError
from seqtrain.registry import Registry
from seqtrain.validation import validate

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

    def example_of(self, split: Split, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`example` of a split, for tasks whose rows are not drawn anew but chosen among those there are."""
        return self.example(length, draw)

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


TASKS: Registry[Task] = Registry("data.source", "seqtrain.data.synthetic", Task)


def examples(
    task: Task, *, length: int, seed: int, first: int, count: int, split: Split = "train"
) -> tuple[Tensor, Tensor]:
    """Rows `first` to `first + count - 1` of a split: `(tokens, labels)`, int64 `[count, length]`.

    Row `index` follows from `(split, seed, index, length)` alone, whichever rows are drawn with it. The splits' random
    streams differ for every seed. Raises `ConfigError` for a length too short.
    """
    task.check(length)
    rows = [task.example_of(split, length, stream(split, seed, index)) for index in range(first, first + count)]
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


# Synthetic rows are scored under this seed whatever a run's own, so that runs can be compared.
HELD_OUT_SEED = 0


def make_task(name: str, fields: dict[str, Any] | None = None) -> Task:
    """The task of file `name`; `fields` of its `Config` that differ from the defaults. Raises `ConfigError`."""
    kind = TASKS.get(name)
    return kind(validate(kind.Config, fields or {}, prefix="data.task."))


@dataclass(frozen=True)
class SyntheticCorpus:
    """The task that `data.source` names, with the fields in `data.task`."""

    task: Task
    held_out_rows: int
    # Every rank makes the rows it reads; there is nothing on disk for it to open.
    folder: ClassVar[Path] = Path()
    # Its settings say all.
    content: ClassVar[dict[str, str]] = {}
    # Its tokens are no text.
    bytes_per_token: ClassVar[None] = None
    texts: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def of(cls, config: DataConfig) -> "SyntheticCorpus":
        return cls(make_task(config.source, config.task), config.held_out_rows)

    def training_batches(self, *, seed: int, sequence_length: int, batch_size: int) -> "SyntheticBatches":
        """As `Corpus.training_batches`."""
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        return SyntheticBatches(self.task, split="train", seed=seed, **sizes)

    def held_out_batches(self, *, sequence_length: int, batch_size: int, max_tokens: int) -> "SyntheticBatches":
        """As `Corpus.held_out_batches`."""
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        rows = min(-(-max_tokens // sequence_length) or self.held_out_rows, self.held_out_rows)
        return SyntheticBatches(self.task, split="held_out", seed=HELD_OUT_SEED, rows=rows, **sizes)

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def about(self) -> str:
        """What a log says of it."""
        return f"{self.task.name} {self.task.config}, {self.held_out_rows} rows held out"


@dataclass(frozen=True)
class TaskRow(Row):
    """One row of a task, int64 `[length]` each; it is a document of its own."""

    tokens: np.ndarray
    labels: np.ndarray
    divisible = False

    def places(self) -> Sequence[tuple[int, Span]]:
        return [(0, Span(0, len(self.tokens)))]

    def starts(self, start: int, stop: int) -> np.ndarray:
        return np.empty(0, dtype=np.int64)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[start:stop], self.labels[start:stop]


class SyntheticBatches(RowBatches):
    """Batches of a task's rows: batch `index` holds rows `index * batch_size` on. `rows`: how many; 0: without end."""

    def __init__(self, task: Task, *, split: Split, seed: int, sequence_length: int, batch_size: int, rows: int = 0):
        task.check(sequence_length)
        self.task = task
        self.split = split
        self.seed = seed
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.taken = rows

    def __len__(self) -> int:
        return -(-self.taken // self.batch_size)

    @property
    def layout(self) -> Layout:
        return Layout(self.sequence_length, 0)

    def text_bytes(self, batch: Batch) -> float:
        """0: the tokens stand for no text."""
        return 0.0

    def row(self, number: int) -> TaskRow:
        tokens, labels = self.task.example_of(self.split, self.sequence_length, stream(self.split, self.seed, number))
        # Rows beyond the last pad the batch; nothing is asked in them.
        return TaskRow(tokens, nothing_asked(self.sequence_length) if 0 < self.taken <= number else labels)
