"""The simulator of steps: what can be worked out by hand, and what must be so whatever the numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.schedules import SCHEDULES
from seqtrain.parallel.schedules.links import Cluster, Costs
from seqtrain.planning.scaling import Noise, Scheme, Work, scan_seconds, simulate

LINKS = Costs(latency=1e-3, overhead=1e-4, byte=8e-8, product=1e-11)
FREE = Costs(latency=0.0, overhead=0.0, byte=0.0, product=0.0)
DENSE = AffineShape.of((1, 8, 64, 64), (1, 8, 64, 64))
STATE = 4 * 8 * 64 * 64
APPLY = 1e-11 * 8 * 64**3
SCHEMES = [Scheme(), *(Scheme(name, 8 if name == "pipeline" else 0) for name in SCHEDULES)]


def one_level(costs):
    return Cluster(costs, costs)


def work(**changes):
    return Work(**{"layers": 4, "forward": 0.02, "backward": 0.03, "shape": DENSE, **changes})


@pytest.mark.parametrize("blocks", [1, 2, 8, 64])
@pytest.mark.parametrize("ranks", [2, 3, 8, 50])
def test_a_pipeline_takes_what_its_formula_says(blocks, ranks):
    came = scan_seconds(one_level(LINKS), work(), Scheme("pipeline", blocks), ranks=ranks)
    on_link, apply = STATE * 8e-8 / blocks, APPLY / blocks
    pace = math.hypot(1e-4 + apply, on_link)
    assert math.isclose(came, (ranks - 1) * (1e-3 + on_link + apply) + (blocks - 1) * pace)


@pytest.mark.parametrize(
    ("name", "least", "ranks"),
    [
        *(("all_gather", 1 - 1e-12, ranks) for ranks in (2, 3, 8, 50)),
        *(("tree", 0.85, ranks) for ranks in (2, 4, 8, 64)),
    ],
)
def test_an_all_gather_takes_what_the_cost_model_says_and_a_tree_that_or_less(name, least, ranks):
    came = scan_seconds(one_level(LINKS), work(), Scheme(name), ranks=ranks)
    expected = Scheme(name).plan(one_level(LINKS), work(), ranks).seconds(LINKS, DENSE, ranks, 4)
    assert least * expected <= came <= expected * (1 + 1e-12)


def test_a_tree_by_hand():
    tree, on_link = Scheme("tree"), STATE * 8e-8
    assert math.isclose(scan_seconds(one_level(LINKS), work(), tree, ranks=2), 1e-3 + on_link)
    # The last of three has state and transition from its neighbour, and then a state on the same link.
    assert math.isclose(scan_seconds(one_level(LINKS), work(), tree, ranks=3), 1e-3 + 3 * on_link)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_rank_computes_and_nothing_else(scheme):
    assert simulate(one_level(LINKS), work(), scheme, ranks=1) == pytest.approx([4 * 0.05])
    assert scan_seconds(one_level(LINKS), work(), scheme, ranks=1) == 0.0


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.schedule != "ring"])
def test_links_that_cost_nothing_leave_compute_alone(scheme):
    assert simulate(one_level(FREE), work(), scheme, ranks=16) == pytest.approx([4 * 0.05])


def test_a_wave_pays_its_fill_once_a_direction_and_a_barrier_every_layer():
    # One block, two links: the state reaches the last rank after the first layer's compute, and a latency later for the
    # receives posted at the start; from then on every layer ends when its compute does, and backward all are waiting.
    hop = 1e-3 + STATE * 8e-8 + APPLY
    wave = simulate(one_level(LINKS), work(), Scheme("pipeline", 1), ranks=3)
    assert 2 * hop > 0.02
    assert wave == pytest.approx([4 * 0.05 + 1e-3 + 2 * hop - 0.02])
    barred = simulate(one_level(LINKS), work(), Scheme("pipeline", 1, barrier=True), ranks=3)
    # Every layer: receives are posted at its start, two hops, and a barrier of two rounds with two latencies each.
    forward, backward = 1e-3 + 2 * hop + 4e-3, max(0.03, 1e-3 + 2 * hop) + 4e-3
    assert barred == pytest.approx([4 * (forward + backward)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_waiting_more_never_helps(scheme):
    def took(ranks=16, **changes):
        changed = Scheme(**{**vars(scheme), **changes})
        return simulate(one_level(LINKS), work(), changed, ranks=ranks)[0]

    assert took(barrier=True) >= took() >= 4 * 0.05
    assert took(overlapped=False) >= took()
    assert took(ranks=64) >= took() >= took(ranks=2)
    slower = one_level(Costs(2e-3, 2e-4, 1.6e-7, 1e-11))
    fixed = scheme if scheme.schedule != "auto" else Scheme("pipeline", 8)
    assert simulate(slower, work(), fixed, ranks=16) >= simulate(one_level(LINKS), work(), fixed, ranks=16)


def test_a_slow_rank_holds_up_all_and_noise_spreads():
    all_slow = Noise(slow_share=1.0, slow_factor=1.5)
    assert simulate(one_level(FREE), work(), Scheme(), all_slow, ranks=4) == pytest.approx([1.5 * 4 * 0.05])
    noise = Noise(compute=0.1, costs=0.1)
    noisy, again = (simulate(one_level(LINKS), work(), Scheme(), noise, ranks=4, samples=16) for _ in range(2))
    assert noisy.shape == (16,)
    assert len(np.unique(noisy)) == 16
    assert np.array_equal(noisy, again)
    replicas = simulate(one_level(LINKS), work(), Scheme(), Noise(compute=0.1), ranks=4, replicas=8, samples=16)
    assert replicas.mean() > noisy.mean()


def test_nodes_pay_the_slow_link_where_it_is():
    # Of 7 links in a chain of 8 places, nodes of 4 make one slow, and nodes of 2 three.
    slow = Costs(latency=5e-3, overhead=1e-4, byte=8e-8, product=1e-11)
    chain = Scheme("pipeline", 1)
    fast = scan_seconds(one_level(LINKS), work(), chain, ranks=8)
    assert math.isclose(scan_seconds(Cluster(LINKS, slow, 4), work(), chain, ranks=8), fast + 4e-3)
    assert math.isclose(scan_seconds(Cluster(LINKS, slow, 2), work(), chain, ranks=8), fast + 3 * 4e-3)
    assert math.isclose(Cluster(LINKS, slow, 2).average(8).latency, (4 * 1e-3 + 3 * 5e-3) / 7)
    # The last place of an all-gather gets 4 maps from outside its node, one of them the first's without transition.
    wide = Costs(latency=1e-3, overhead=1e-4, byte=1.6e-7, product=1e-11)
    gather = Scheme("all_gather")
    more = scan_seconds(Cluster(LINKS, wide, 4), work(), gather, ranks=8)
    assert math.isclose(more, scan_seconds(one_level(LINKS), work(), gather, ranks=8) + 7 * STATE * 8e-8)


def test_a_scan_costs_its_caller_time():
    busy = simulate(one_level(FREE), work(caller=1e-3), Scheme(), ranks=4)
    assert busy == pytest.approx([4 * 0.05 + 8 * 1e-3])


def test_gradients_and_gathered_parameters_are_paid_for():
    idle = one_level(Costs(latency=1e-3, overhead=0.0, byte=1e-8, product=0.0))
    plain = simulate(idle, work(), Scheme("pipeline", 1), ranks=4, replicas=2)
    reduced = simulate(idle, work(gradient_bytes=8e6), Scheme("pipeline", 1), ranks=4, replicas=2)
    assert reduced - plain == pytest.approx([2 * (3e-3 + 7 / 8 * 0.08)])
    # In shards of two: halves there and back, then 4 MB over four replicas.
    sharded = simulate(idle, work(gradient_bytes=8e6), Scheme("pipeline", 1), ranks=4, replicas=2, shard=2)
    assert sharded - plain == pytest.approx([2 * (1e-3 + 1 / 2 * 0.08 + 2e-3 + 3 / 4 * 0.04)])
    # 56 ms of gather and three latencies under 20 and 30 ms of compute, and everyone waits for the last.
    gathered = simulate(one_level(FREE), work(parameter_bytes=8e6), Scheme(), ranks=8)
    assert gathered == pytest.approx([0.2])
    gathered = simulate(idle, work(parameter_bytes=8e6), Scheme("pipeline", 1), ranks=8)
    assert gathered[0] > 4 * (2 * (3e-3 + 7 / 8 * 0.08))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("changes", [{"layers": 24}, {"layers": 9, "ready": 0.5, "parameter_bytes": 1e7}])
def test_layers_that_repeat_are_not_simulated_again(scheme, changes):
    """A slow rank's factor that no rank has takes every layer, one by one."""
    cluster, of_work = Cluster(replace(LINKS, latency=1e-5, byte=1e-9), LINKS, node=4), work(**changes)
    layer_by_layer = simulate(cluster, of_work, scheme, Noise(slow_factor=2.0), ranks=16, replicas=2, samples=2)
    np.testing.assert_allclose(
        simulate(cluster, of_work, scheme, ranks=16, replicas=2, samples=2), layer_by_layer, 1e-9
    )
