"""A synthetic task in the place of a corpus: rows are drawn when a batch is asked for, and none is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from seqtrain.data.batches import IGNORED, WHOLE_BATCH, Batch, BatchSlice, even_offsets
from seqtrain.data.config import DataConfig
from seqtrain.data.synthetic._base import Split, Task, examples
from seqtrain.data.synthetic._registry import TASKS
from seqtrain.validation import validate

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


class SyntheticBatches:
    """Batches of a task's rows: batch `index` holds rows `index * batch_size` on. `rows`: how many; 0: without end.

    Every row is a document of its own.
    """

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

    def text_bytes(self, batch: Batch) -> float:
        """0: the tokens stand for no text."""
        return 0.0

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """A slice of batch `index`, as in `Batches.at`."""
        mine = part.rows(self.batch_size)
        first = index * self.batch_size + mine.start
        tokens, labels = examples(
            self.task, length=self.sequence_length, seed=self.seed, first=first, count=len(mine), split=self.split
        )
        if self.taken:
            # Rows beyond the last pad the batch; nothing is asked in them.
            labels[max(self.taken - first, 0) :] = IGNORED
        offsets = even_offsets(tokens.numel(), part.parts)
        held = part.tokens(offsets)
        boundaries = torch.arange(len(mine) + 1, dtype=torch.int32) * self.sequence_length
        return Batch(tokens.view(1, -1)[:, held], labels.view(1, -1)[:, held], offsets, boundaries)
