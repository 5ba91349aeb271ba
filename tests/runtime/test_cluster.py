"""Which ranks go to which node, and how that is drawn."""

import random

import pytest

from seqtrain.runtime.cluster import Node, drawn, place, straddling
from seqtrain.runtime.driver import sizes
from tests.runtime.runtime_cases import change, losses, score, small_config, train_on


def node(number, cpus=8, rack=""):
    return Node(f"id{number}", f"node{number}", f"10.0.0.{number}", cpus, 0, rack)


def placed(room, ranks, group):
    return [
        int(each.host[4:]) for each in place([(node(n, rack=rack), count) for n, count, rack in room], ranks, group)
    ]


def test_groups_lie_inside_nodes_where_they_fit():
    # A node with a spare: 7 of its 8.
    assert placed([(0, 7, ""), (1, 8, "")], 12, 4) == [0] * 4 + [1] * 8
    # Only if there is no other room, what is left of several is one group.
    assert placed([(0, 7, ""), (1, 5, "")], 12, 4) == [0] * 4 + [1] * 4 + [0] * 3 + [1]
    # And first of what is near.
    assert placed([(0, 3, "a"), (1, 2, "b"), (2, 2, "b"), (3, 9, "c")], 12, 4) == [3] * 8 + [1, 1, 2, 2]
    assert placed([(0, 3, ""), (1, 3, "")], 8, 4) == []


def test_groups_larger_than_a_node():
    assert placed([(n, 2, "") for n in range(4)], 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    nodes = [node(n) for n in range(2)]
    assert straddling([nodes[0], nodes[0], nodes[1], nodes[1]], 4) == 1
    assert straddling([nodes[0], nodes[0], nodes[1], nodes[1]], 2) == 0


def test_every_rank_has_a_place_and_no_node_too_many():
    chance, full = random.Random(0), 0
    for _ in range(500):
        group, ranks = chance.randint(1, 5), chance.randint(1, 8)
        racks = sorted(chance.choices("ab", k=chance.randint(1, 8)))
        room = [(node(number, rack=rack), chance.randint(0, 9)) for number, rack in enumerate(racks)]
        places = place(room, ranks * group, group)
        full += not places
        assert len(places) == (ranks * group if ranks * group <= sum(count for _, count in room) else 0)
        assert all(places.count(each) <= count for each, count in room)
        whole = sum(count // group for _, count in room)
        assert straddling(places, group) <= max(0, ranks - whole)
    assert 0 < full < 250


def test_a_layout_is_drawn_by_node():
    places = place([(node(0), 6), (node(1, rack="r2"), 6)], 12, 4)
    assert list(drawn(places, 4)) == [
        "  node0 (10.0.0.0): [0-3][8 9 ..]",
        "  node1 (10.0.0.1), rack r2: [4-7][.. 10 11]",
    ]


def test_an_elastic_run_has_as_many_ranks_as_its_sequences_allow(tmp_path):
    config = small_config(tmp_path, parallel={"sequence": 2, "data": 4}, runtime={"name": "ray", "workers": (3, 8)})
    assert sizes(config) == [8, 6, 4]
    assert sizes(change(config, runtime={"workers": ()})) == [8]


@pytest.mark.all
def test_uneven_shares_give_the_losses_of_the_whole_batch(tmp_path):
    config = small_config(tmp_path, train={"micro_batch_size": 1, "batch_size": 8, "steps": 4})
    uneven = [
        change(config, f"on{data}", parallel={"data": data, "zero_stage": stage}, runtime={"workers": (1, 8)})
        for data, stage in ((3, 2), (5, 0))
    ]
    train_on(config, *uneven)
    for each in uneven:
        assert losses(each) == pytest.approx(losses(config), rel=1e-6)
        assert score(each) == pytest.approx(score(config), rel=1e-6)
