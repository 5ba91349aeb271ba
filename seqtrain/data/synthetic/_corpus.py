"""A synthetic task in the place of a corpus: rows are drawn when a batch is asked for, and none is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from seqtrain.config import validate
from seqtrain.data.batches import IGNORED, WHOLE_BATCH, Batch, Share
from seqtrain.data.config import DataConfig
from seqtrain.data.synthetic._base import Split, Task, examples
from seqtrain.data.synthetic._registry import TASKS
from seqtrain.parallel import even_offsets


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

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def about(self) -> str:
        """What a log says of it."""
        return f"{self.task.name} {self.task.config}, {self.held_out_rows} rows held out"


class SyntheticBatches:
    """Batches of a task's rows: batch `index` holds rows `index * batch_size` on. `rows`: how many; 0: without end.

    Every row is a document of its own. `Batch.bytes` is 0: the tokens stand for no text.
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

    def at(self, index: int, share: Share = WHOLE_BATCH) -> Batch:
        """A share of batch `index`, as in `Batches.at`."""
        mine = share.rows(self.batch_size)
        first = index * self.batch_size + mine.start
        tokens, labels = examples(
            self.task, length=self.sequence_length, seed=self.seed, first=first, count=len(mine), split=self.split
        )
        if self.taken:
            # Rows beyond the last fill up the batch; nothing is asked in them.
            labels[max(self.taken - first, 0) :] = IGNORED
        offsets = even_offsets(tokens.numel(), share.parts)
        held = slice(offsets[share.part], offsets[share.part + 1])
        boundaries = torch.arange(len(mine) + 1, dtype=torch.int32) * self.sequence_length
        return Batch(tokens.view(1, -1)[:, held], labels.view(1, -1)[:, held], offsets, boundaries, bytes=0.0)
