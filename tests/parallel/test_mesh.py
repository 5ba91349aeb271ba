"""Ranks as a mesh: which ranks are sequence parallel, and what is left when it is taken down."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from seqtrain.parallel import all_scan
from seqtrain.parallel.mesh import form_mesh
from seqtrain.parallel.testing import run_ranks
from tests.parallel.ranks import on_ranks


def form(sequence: int, algorithm: str = "ring"):
    return form_mesh(
        dist.group.WORLD, sequence=sequence, algorithm=algorithm, device=torch.device("cpu"), timeout_seconds=20
    )


def test_neighbors_share_a_sequence_and_others_do_not():
    def place(rank):
        with form(2) as mesh:
            _, total = all_scan(None, torch.full((1, 1, 1, 1), float(rank)), group=mesh.group, algorithm="ring")
            return (mesh.data_rank, mesh.data_ranks, mesh.sequence_rank, mesh.sequence_ranks), total.item()

    coordinates, totals = zip(*run_ranks(4, place), strict=True)
    assert coordinates == ((0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2))
    assert totals == (0, 1, 2, 5), "a scan stays inside its group"


@on_ranks(2)
def test_a_whole_sequence_needs_no_group(rank):
    with form(1) as mesh:
        assert (mesh.group, mesh.data_rank) == (None, rank)


@on_ranks(4)
def test_meshes_one_after_the_other_are_cut_differently(rank):
    for ranks in (4, 2, 4):
        with form(ranks, "auto") as mesh:
            _, total = all_scan(None, torch.ones(1, 1, 1, 1), group=mesh.group)
            assert (mesh.sequence_rank, total.item()) == (rank % ranks, rank % ranks + 1)


def test_shards_are_neighbors_and_replicas_hold_the_same_parts():
    def place(rank):
        device = torch.device("cpu")
        with form_mesh(
            dist.group.WORLD, sequence=1, shard=2, algorithm="ring", device=device, timeout_seconds=20
        ) as mesh:
            return [dist.get_process_group_ranks(each) for each in (mesh.shards.group, mesh.shards.replicas)]

    assert run_ranks(4, place) == [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]


@pytest.mark.all
def test_ten_thousand_ranks():
    """Every rank forms every group: 1,250 of sequences, 125 shards and 80 of replicas."""

    def place(_):
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=4321, world_size=10_000)
        begun = time.process_time()
        with form_mesh(
            dist.group.WORLD,
            sequence=8,
            shard=80,
            algorithm="pipeline",
            device=torch.device("cpu"),
            timeout_seconds=20,
        ) as mesh:
            shards = mesh.shards.group.size(), mesh.shards.replicas.size()
            return (mesh.data_rank, mesh.sequence_rank, mesh.group.size(), *shards), time.process_time() - begun

    [(coordinates, seconds)] = run_ranks(1, place)
    assert coordinates == (540, 1, 8, 80, 125)
    assert seconds < 5
