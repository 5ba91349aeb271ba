"""The inputs of a teacher's layer for every sequence of a run, on disk: float32 `[sequences, T, D]` in the run's order.

Advancing them to a later layer needs only the blocks between, so the teacher is streamed once.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from seqtrain.data import WHOLE_BATCH, Batch, BatchSlice
from seqtrain.files import replacing
from seqtrain.models import LanguageModel
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.task import TrainingData


class CachedInputs:
    """Training batches that hold, in place of tokens, the inputs `[1,n,D]` that a file has for them."""

    def __init__(self, batches: TrainingData, file: Path, *, batch_size: int, sequence_length: int, width: int):
        self.batches = batches
        self.batch_size = batch_size
        self.rows = np.memmap(file, np.float32, "r").reshape(-1, sequence_length, width)

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """As `seqtrain.data.Batches.at`, but for the tokens."""
        batch, rows = self.batches.at(index, part), part.rows(self.batch_size)
        first = index * self.batch_size
        held = self.rows[first + rows.start : first + rows.stop].reshape(1, -1, self.rows.shape[2])
        return replace(batch, tokens=torch.from_numpy(held[:, part.tokens(batch.offsets)].copy()))


@torch.no_grad()
def advance(
    teacher: LanguageModel,
    batches: TrainingData,
    file: Path,
    *,
    first: int,
    last: int,
    steps: int,
    backend: str,
    progress: Callable[[int], None],
) -> None:
    """Writes the inputs of layer `last` for the batches of `steps` steps to `file`, atomically.

    `batches`: of tokens where `first` is 0, else `CachedInputs` of layer `first`. `progress(step)`: what is done.
    """
    with replacing(file) as unfinished, unfinished.open("wb") as opened:
        for step in range(steps):
            batch = batches.at(step)
            x = batch.tokens if batch.tokens.is_floating_point() else teacher.embedding(batch.tokens)
            sequence = SequenceContext(cu_seqlens=batch.cu_seqlens, backend=backend)
            for block in teacher.blocks[first:last]:
                x, _ = block(x, None, sequence=sequence)
            opened.write(x.float().numpy().tobytes())
            progress(step + 1)
