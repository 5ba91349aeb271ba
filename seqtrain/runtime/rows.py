"""A packed row on its way from the data to the model: whole, or in segments that follow each other in time."""

from collections.abc import Callable

import torch

from seqtrain.data import Batch
from seqtrain.models.streaming import Segment, borders_within
from seqtrain.parallel.continued import ContinuedSequence
from seqtrain.parallel.mesh import Mesh


def read_row(at: Callable[..., Batch], mesh: Mesh, *, pieces: int) -> list[Batch]:
    """What this rank holds of each of a row's `pieces`: `at(part=, parts=)` reads a part of it.

    The ranks that share a sequence share each piece: the row is cut into `pieces * ranks` parts.
    """
    ranks = mesh.sequence_ranks
    return [at(part=piece * ranks + mesh.sequence_rank, parts=pieces * ranks) for piece in range(pieces)]


def as_segments(row: list[Batch], mesh: Mesh, *, backend: str, device: torch.device) -> list[Segment]:
    """The pieces that `read_row` read, as segments on `device`."""
    found, ranks = [], mesh.sequence_ranks
    for piece, batch in enumerate(row):
        offsets = batch.offsets[piece * ranks : (piece + 1) * ranks + 1]
        first, last = offsets[0], offsets[-1]
        borders = borders_within(batch.cu_seqlens, first, last)
        sequence = mesh.sequence(tuple(offset - first for offset in offsets), borders, backend=backend)
        if mesh.group is None and len(row) > 1:
            sequence = ContinuedSequence.of(sequence)
        tokens, labels = batch.tokens.to(device), batch.labels.to(device)
        found.append(Segment.of(tokens, labels, batch.cu_seqlens, first=first, sequence=sequence))
    return found
