"""The cost model: its figures by hand, its choices, and that all ranks make the same one."""

import math

import pytest
import torch
import torch.distributed as dist

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel import all_scan, cost
from seqtrain.parallel.scan import plan_scan
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.schedules import Costs, Pipeline, choose
from seqtrain.parallel.schedules.all_gather import AllGather
from seqtrain.parallel.schedules.tree import Tree
from seqtrain.parallel.testing import run_ranks

# 1 ms, 100 Mbit/s, and a float32 state of 128 KiB: the setting of docs/sequence_parallel.md.
LINKS = Costs(latency=1e-3, overhead=1e-4, byte=8e-8, product=0.0)
DENSE = AffineShape.of((1, 8, 64, 64), (1, 8, 64, 64))
HEADS = AffineShape.of((1, 8, 64, 64), (1, 8))
STATE = 4 * 8 * 64 * 64


def test_seconds_by_hand():
    once = STATE * 8e-8  # the state on the link: 10.5 ms
    assert math.isclose(Pipeline(1).seconds(LINKS, DENSE, 8, 4), 7 * (1e-3 + once))
    blocks = 7 * (1e-3 + once / 8) + 7 * math.hypot(1e-4, once / 8)
    assert math.isclose(Pipeline(8).seconds(LINKS, DENSE, 8, 4), blocks)
    # Three rounds: a state with M twice, then a state.
    assert math.isclose(Tree().seconds(LINKS, DENSE, 8, 4), 3e-3 + (2 + 2 + 1) * once)
    assert math.isclose(AllGather().seconds(LINKS, DENSE, 8, 4), 1.5e-3 + 6e-4 + (7 + 6) * once)
    # Without M, half of the first place's other two messages is in the way of its first.
    factors = 4 * 8 * 8e-8
    assert math.isclose(Tree().seconds(LINKS, HEADS, 8, 4), 3e-3 + (2 + 1 + 1) * once + factors)
    assert Tree().seconds(LINKS, DENSE, 1, 4) == 0.0


def test_an_uneven_cut_waits_for_its_largest_blocks():
    # 8 heads in 6 blocks: two of them hold two heads, and each of the 6 further links takes one of those.
    head = STATE * 8e-8 / 8
    uneven = 7e-3 + 8 / 6 * head + 6 * 2 * head + 5 * math.hypot(1e-4, 8 / 6 * head)
    assert math.isclose(Pipeline(6).seconds(LINKS, HEADS, 8, 4), uneven)


def test_seconds_count_the_dense_products():
    slow = Costs(latency=0.0, overhead=0.0, byte=0.0, product=1e-9)
    apply = 8 * 64**3 * 1e-9
    assert math.isclose(Pipeline(4).seconds(slow, DENSE, 3, 4), (2 + 3) * apply / 4)
    assert Pipeline(4).seconds(slow, HEADS, 3, 4) == 0.0


@pytest.mark.parametrize(
    ("links", "places", "expected"),
    [
        (LINKS, 8, "pipeline"),
        (Costs(latency=1e-2, overhead=1e-4, byte=1e-12, product=0.0), 64, "all_gather"),
        (Costs(latency=1e-3, overhead=1e-3, byte=1e-8, product=0.0), 64, "tree"),
    ],
)
def test_each_schedule_is_chosen_where_it_is_cheapest(links, places, expected):
    assert choose(links, HEADS, places, 4, "auto").name == expected


def test_block_count_follows_the_optimum():
    blocks = choose(LINKS, HEADS, 8, 4, "pipeline").blocks
    optimum = math.sqrt(6 * STATE * 8e-8 / 1e-4)
    assert optimum / 1.5 < blocks < optimum * 2
    assert choose(LINKS, HEADS, 2, 4, "pipeline").blocks == 1


def measured_alike(rank):
    # Each rank believes something else about its own links; rank 0's belief must become everybody's.
    real = cost._round_trip
    cost._round_trip = lambda *arguments: real(*arguments) * 10.0**rank
    engine = engine_of(dist.group.WORLD.group_name)
    costs = cost.measure(engine, torch.device("cpu"))
    assert min(costs.latency, costs.byte, costs.product) >= 0
    assert costs.latency > 0
    state_in, _ = all_scan(None, torch.ones(1, 2, 3, 4), group=dist.group.WORLD)
    assert state_in.unique().tolist() == [float(rank)]
    plans = [
        plan_scan(engine, AffineShape.of((1, 1, width, width), None), torch.float32, torch.device("cpu"), "auto")
        for width in (2, 64, 512)
    ]
    return costs, plans


@pytest.mark.all
def test_all_ranks_measure_and_choose_alike():
    outcomes = run_ranks(4, measured_alike)
    assert all(outcome == outcomes[0] for outcome in outcomes)
