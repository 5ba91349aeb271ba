"""Ranks as a mesh: which ranks are sequence parallel, and what is left when it is taken down."""

import pytest
import torch
import torch.distributed as dist

from seqtrain.parallel import ShardedSequence, all_scan
from seqtrain.parallel.mesh import form_mesh
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.testing import run_ranks


def form(sequence: int, algorithm: str = "ring"):
    return form_mesh(
        dist.group.WORLD, sequence=sequence, algorithm=algorithm, device=torch.device("cpu"), timeout_seconds=20
    )


def test_neighbors_share_a_sequence_and_others_do_not():
    def place(rank):
        with form(2) as mesh:
            _, total = all_scan(None, torch.full((1, 1, 1, 1), float(rank)), group=mesh.group, algorithm="ring")
            sequence = mesh.sequence((0, 3, 5), None, backend="chunked")
            assert isinstance(sequence, ShardedSequence)
            coordinates = mesh.data_rank, mesh.data_ranks, mesh.sequence_rank, mesh.sequence_ranks
            return coordinates, total.item(), sequence.start, sequence.end, sequence.backend, sequence.algorithm

    coordinates, totals, *told = zip(*run_ranks(4, place), strict=True)
    assert coordinates == ((0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2))
    assert totals == (0, 1, 2, 5), "a scan stays inside its group"
    assert told == [(0, 3) * 2, (3, 5) * 2, ("chunked",) * 4, ("ring",) * 4]


@pytest.mark.all
def test_a_whole_sequence_needs_no_group():
    def place(rank):
        with form(1) as mesh:
            return mesh.group, mesh.data_rank, mesh.sequence((0, 5), torch.tensor([0, 5]), backend="auto")

    for rank, (group, data_rank, sequence) in enumerate(run_ranks(2, place)):
        assert (group, data_rank, type(sequence)) == (None, rank, SequenceContext)


@pytest.mark.all
def test_meshes_one_after_the_other_are_cut_differently():
    def places(rank):
        found = []
        for sequence in (4, 2, 4):
            with form(sequence, "auto") as mesh:
                _, total = all_scan(None, torch.ones(1, 1, 1, 1), group=mesh.group)
                found.append((mesh.sequence_rank, total.item()))
        return found

    for rank, found in enumerate(run_ranks(4, places)):
        assert found == [(rank, rank + 1), (rank % 2, rank % 2 + 1), (rank, rank + 1)]
