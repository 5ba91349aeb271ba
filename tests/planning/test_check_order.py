"""Real steps on several ranks ask for communication in orders that don't deadlock on GPUs."""

from itertools import product

import pytest

from seqtrain.parallel.order import deadlocks
from seqtrain.parallel.schedules import ALGORITHMS
from seqtrain.planning import check_order
from seqtrain.planning.check_order import Verdict, orders_of
from tests.runtime.runtime_cases import change, small_config
from tests.tiers import half

HYBRID = ("gated_delta_net", "s5", "sliding_attention", "attention")


def assert_free(tmp_path, *grids, **sections):
    """Of each grid: data, sequence, stage and whatever else of `parallel`."""
    base = small_config(tmp_path, *HYBRID, checkpoint={"every": 0}, **sections)
    for grid, orders in zip(grids, orders_of(*(change(base, parallel=grid) for grid in grids)), strict=True):
        verdict = Verdict.of(orders)
        assert verdict.free, f"{grid}: {verdict}"
        assert len({each.communicator for order in orders for each in order}) > 1
        assert min(len(order) for order in orders) > 50
    return orders


@pytest.mark.all
def test_steps_of_four_ranks(tmp_path):
    grids = (
        {"data": 1, "sequence": 4, "zero_stage": 3, "algorithm": "tree"},
        {"data": 2, "sequence": 2, "zero_stage": 2, "algorithm": "pipeline"},
        {"data": 1, "sequence": 4, "zero_stage": 1, "algorithm": "all_gather"},
        {"data": 2, "sequence": 2, "zero_stage": 3, "algorithm": "ring", "shard": 2},
    )
    orders = assert_free(tmp_path, *grids)
    # Where one rank alone reduces earlier than the others do, it is found.
    last = max(number for number, each in enumerate(orders[0]) if len(each.ranks) == 4)
    first = next(number for number, each in enumerate(orders[0]) if len(each.ranks) == 2)
    moved = [orders[0][last], *orders[0][first:last]]
    assert deadlocks([[*orders[0][:first], *moved, *orders[0][last + 1 :]], *orders[1:]], "device")


@pytest.mark.full
@pytest.mark.parametrize(("stage", "sequence"), half((0, 1, 2, 3), (2, 4, 8)))
def test_steps_of_eight_ranks(tmp_path, stage, sequence):
    grid = {"data": 8 // sequence, "sequence": sequence, "zero_stage": stage}
    assert_free(tmp_path, *({**grid, "algorithm": name} for name in ALGORITHMS))


@pytest.mark.full
def test_steps_with_sharded_experts(tmp_path):
    grids = [{"sequence": s, "data": 4 // s, "experts": e, "zero_stage": 2} for s, e in product((1, 2, 4), (2, 4))]
    assert_free(tmp_path, *grids, model={"experts": 4, "expert_width": 12})


@pytest.mark.full
def test_steps_of_shards_with_replicas(tmp_path):
    layouts = product((1, 2, 3), ((8, 1, 2), (4, 2, 2), (2, 4, 4), (4, 2, 4)))
    grids = [{"data": d, "sequence": s, "zero_stage": stage, "shard": n} for stage, (d, s, n) in layouts]
    assert_free(tmp_path, *grids)


@pytest.mark.full
def test_the_command(capsys):
    words = ["parallel.sequence=2", "parallel.data=1", "model.width=32", "model.heads=2", "model.depth=2"]
    assert check_order.main(words) == 0
    assert "one operation in all at a time: free of deadlock" in capsys.readouterr().out
