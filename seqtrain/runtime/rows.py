"""A packed row on its way from the data to the model: whole, or in segments that follow each other in time."""

from collections.abc import Callable
from dataclasses import replace

import torch

from seqtrain.data import Batch, Share
from seqtrain.models.streaming import Segment, boundaries_within
from seqtrain.parallel.continued import ContinuedSequence
from seqtrain.parallel.mesh import Mesh


def read_row(at: Callable[[Share], Batch], mesh: Mesh, *, pieces: int, number: int = 0, of: int = 1) -> list[Batch]:
    """What this rank holds of each of the `pieces` of its row: micro-batch `number` of `of`. `at` reads a share.

    The ranks that share a sequence share each piece: the row is cut into `pieces * ranks` parts.
    """
    ranks, row = mesh.sequence_ranks, Share(mesh.data_rank, mesh.data_ranks, number, of)
    parts = range(mesh.sequence_rank, pieces * ranks, ranks)
    return [at(replace(row, part=part, parts=pieces * ranks)) for part in parts]


def as_segments(row: list[Batch], mesh: Mesh, *, backend: str, device: torch.device) -> list[Segment]:
    """The pieces that `read_row` read, as segments on `device`."""
    found, ranks = [], mesh.sequence_ranks
    for piece, batch in enumerate(row):
        offsets = batch.offsets[piece * ranks : (piece + 1) * ranks + 1]
        first, last = offsets[0], offsets[-1]
        boundaries = boundaries_within(batch.cu_seqlens, first, last)
        sequence = mesh.sequence(tuple(offset - first for offset in offsets), boundaries, backend=backend)
        if mesh.group is None and len(row) > 1:
            sequence = ContinuedSequence.of(sequence)
        tokens, labels = batch.tokens.to(device), batch.labels.to(device)
        found.append(Segment.of(tokens, labels, batch.cu_seqlens, first=first, sequence=sequence))
    return found
