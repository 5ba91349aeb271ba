"""What enters a layer of the teacher, for every sequence of a run, kept on disk: the teacher is streamed once.

A file holds float32 `[sequences, T, D]`, in the order the run reads its sequences. Advancing it from one layer to
another needs the blocks between alone.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqtrain.data import WHOLE_BATCH, Batch, BatchSlice
from seqtrain.files import replacing
from seqtrain.models import LanguageModel
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.task import TrainingData


class CachedInputs:
    """Training batches that hold, in the place of tokens, what a file says enters a layer for them: `[1,n,D]`."""

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
    """Writes to `file` what enters layer `last` for the batches of `steps` steps, whole or not at all.

    `batches`: of tokens where `first` is 0, else `CachedInputs` of layer `first`. `progress(step)`: what is done.
    """
    with replacing(file) as unfinished, unfinished.open("wb") as opened:
        for step in range(steps):
            batch = batches.at(step)
            x = batch.tokens if batch.tokens.is_floating_point() else teacher.embedding(batch.tokens)
            sequence = SequenceContext(cu_seqlens=batch.cu_seqlens, backend=backend)
            for block in teacher.blocks[first:last]:
                x = _through(block, x, sequence)
            opened.write(x.float().numpy().tobytes())
            progress(step + 1)


def _through(block: Any, x: Tensor, sequence: SequenceContext) -> Tensor:
    return block(x, None, sequence=sequence)[0]
