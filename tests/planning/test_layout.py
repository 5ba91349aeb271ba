"""Predicted seconds and bytes follow from counts and constants as they should; figures by hand."""

from dataclasses import replace

import pytest
import torch

from seqtrain.mixers import MIXERS
from seqtrain.models import ModelConfig
from seqtrain.models.families import Piece
from seqtrain.models.lora import add_adapters
from seqtrain.parallel.schedules.links import Cluster, Costs
from seqtrain.parallel.tensor import TensorParallel
from seqtrain.planning.counts import ModelCounter
from seqtrain.planning.layout import Layout, Machine, compute_seconds, memory_bytes, predict
from seqtrain.planning.trace import Recorded

ONE = Layout(data=1, sequence=1, stage=0, checkpointing=False, micro_batch=1, batch=1)
LINKS = Costs(latency=1e-4, overhead=1e-5, byte=1e-9, product=1e-10)
CLUSTER = Cluster(LINKS, LINKS)
MACHINE = Machine(name="by hand", memory=1e9, processors=4, base=5e6)


def count(rows=1, **options):
    config = ModelConfig(layers=("gated_delta_net", "attention"), depth=2, width=32, heads=2)
    mixers = {name: MIXERS.get(name).Config() for name in config.layers}
    return ModelCounter(config, mixers, 50, **options).count(64, rows)


@pytest.fixture(scope="module")
def counts():
    return count()


def changed(**fields):
    return replace(ONE, **fields)


def total(counts, machine, **options):
    return sum(compute_seconds(counts, machine, again=0, **options).values())


def test_compute_is_products_over_their_rate_and_bytes_over_the_stream(counts):
    free = replace(MACHINE, stream=1e30, attention=1e30, kernels=1e30, products={"float32": 1e9})
    seconds = compute_seconds(counts, free, again=0)
    # With nothing to wait for but products: those of projections, MLPs and the head.
    found = [work.calls for part in counts.parts for work in (part.forward, part.backward)]
    flops = sum(calls.flops for each in found for name, calls in each.items() if "scaled_dot_product" not in name)
    assert seconds["products"] == pytest.approx(flops / 1e9)
    assert sum(seconds.values()) == pytest.approx(seconds["products"], rel=1e-6)
    slow = replace(free, stream=1e6)
    assert compute_seconds(counts, slow, again=0)["memory traffic"] > 0
    touched = replace(free, fresh=1.0, mapped_above=10.0)
    made = replace(counts.parts[1].forward, made={10.0: 5, 20.0: 3})
    large = replace(counts, parts=(replace(counts.parts[1], forward=made, backward=Recorded()),))
    assert compute_seconds(large, touched, again=0)["memory traffic"] == pytest.approx(60.0)
    called = replace(free, call=1.0)
    operators = sum(calls.count for each in found for calls in each.values())
    assert compute_seconds(counts, called, again=0)["calls"] == operators


def test_recomputed_layers_cost_their_forward_pass(counts):
    kept, again = (sum(compute_seconds(counts, MACHINE, again=flag).values()) for flag in (False, True))
    parts = [replace(p, backward=type(p.backward)(), executed_backward=0.0) for p in counts.parts[1:-1]]
    assert again - kept == pytest.approx(total(replace(counts, parts=tuple(parts)), MACHINE))
    assert total(counts, replace(MACHINE, efficiency={"gated_delta_net": 2.0})) > kept


def test_more_rounds_and_crowded_processors_take_longer(counts):
    once = predict(counts, ONE, MACHINE, CLUSTER)
    twice = predict(counts, changed(batch=2), MACHINE, CLUSTER)
    assert twice.step_seconds - once.step_seconds == pytest.approx(sum(once.each.values()))
    assert once.once == twice.once
    crowded = replace(MACHINE, processors=1)
    pair = changed(data=2, batch=2)
    compute = [predict(counts, pair, m, CLUSTER).seconds["products"] for m in (MACHINE, crowded)]
    assert compute[1] == pytest.approx(2 * compute[0])


def test_exchanges_are_there_where_ranks_are(counts):
    alone = predict(counts, ONE, MACHINE, CLUSTER).seconds
    assert alone["sequence exchange"] == alone["gradient exchange"] == 0
    data = predict(counts, changed(data=2, batch=2), MACHINE, CLUSTER).seconds
    # A reduce-scatter and an all-gather of half of the gradients each, at 1 GB/s.
    assert data["gradient exchange"] == pytest.approx(2 * (1e-4 + 2 * counts.parameters * 1e-9))
    sharded = predict(counts, changed(sequence=2), MACHINE, CLUSTER).seconds
    assert sharded["sequence exchange"] > 2e-4
    links = Cluster(replace(LINKS, byte=1e-7), LINKS)
    slower = predict(counts, changed(sequence=2), MACHINE, links).seconds
    assert slower["sequence exchange"] > sharded["sequence exchange"]


def test_memory_by_zero_stage(counts):
    size = 4 * counts.parameters
    plain = memory_bytes(counts, ONE, MACHINE)
    assert plain["program"] == 5e6
    assert (plain["weights"], plain["optimizer"]) == (size, 2 * size)
    stages = [memory_bytes(counts, changed(data=4, batch=4, stage=stage), MACHINE) for stage in range(4)]
    assert stages[1]["optimizer"] == pytest.approx(3 * size / 4)
    assert stages[3]["weights"] < stages[2]["weights"] * 0.9 + 2 * size
    totals = [sum(each.values()) for each in stages]
    assert totals[2] <= totals[1]
    shard = memory_bytes(counts, changed(data=64, batch=64, stage=3, shard=4), MACHINE)
    assert shard["optimizer"] == stages[3]["optimizer"]
    again = memory_bytes(counts, changed(checkpointing=True), MACHINE)
    assert again["activations kept"] < plain["activations kept"]
    loose = replace(MACHINE, unused_kept=0.5, unused_passing=2.0)
    found = memory_bytes(counts, ONE, loose)
    kinds = found["activations kept"], found["temporaries and gradients"]
    assert found["unused"] == pytest.approx(0.5 * kinds[0] + 2 * kinds[1])
    # What the system takes back leaves nothing unused.
    assert memory_bytes(counts, ONE, replace(loose, mapped_above=1.0))["unused"] == pytest.approx(0, abs=1)


def test_layers_of_a_sharded_sequence_take_as_much_longer_as_was_measured(counts):
    slower = replace(MACHINE, cut={"gated_delta_net": 3.0})
    assert total(counts, slower) == total(counts, MACHINE)
    mixer = replace(counts, parts=tuple(part for part in counts.parts if part.kind == "gated_delta_net"))
    assert total(counts, slower, shards=2) - total(counts, MACHINE, shards=2) == pytest.approx(
        2 * total(mixer, MACHINE)
    )


def test_ranks_of_a_node_slow_each_other_as_was_measured(counts):
    slower = replace(MACHINE, beside=1.25, processors=2)
    even = replace(slower, beside=1.0)
    alone = [predict(counts, ONE, machine, CLUSTER).step_seconds for machine in (slower, even)]
    assert alone[0] == alone[1]
    pair = [predict(counts, changed(data=2, batch=2), machine, CLUSTER).seconds for machine in (slower, even)]
    assert pair[0]["products"] == pytest.approx(1.25 * pair[1]["products"])


def test_ranks_of_one_computer_share_its_memory(counts):
    shared = replace(MACHINE, shared=True)
    pair = predict(counts, changed(data=2, batch=2), shared, CLUSTER)
    assert pair.room == 5e8
    assert pair.fits
    tight = predict(counts, ONE, replace(MACHINE, memory=5.1e6), CLUSTER)
    assert not tight.fits
    assert tight.binds == max(tight.bytes, key=lambda kind: tight.bytes[kind])


@pytest.mark.all
def test_more_rows_are_in_proportion(counts):
    direct, times = count(rows=3), counts.of_rows(3)
    assert times.step_flops == direct.step_flops
    executed = [each.executed_flops(checkpointing=True) for each in (times, direct)]
    assert executed[0] == pytest.approx(executed[1], rel=0.02)
    for again in (False, True):
        assert times.peak_bytes(checkpointing=again) == pytest.approx(direct.peak_bytes(checkpointing=again), rel=0.15)
    shapes = [[each.shape for part in one.parts for each in part.exchanges] for one in (times, direct)]
    assert [s.state_numbers for s in shapes[0] if s] == [s.state_numbers for s in shapes[1] if s]
    assert times.dtype == torch.float32


def test_adapters_alone_have_gradients_and_moments(counts):
    def adapt(model):
        add_adapters(model, {"out": [Piece("out.weight", "blocks.1.mixer.out.weight")]}, rank=4, alpha=4)

    adapted = count(adapt=adapt)
    assert adapted.trained == 4 * (32 + 32) == adapted.parameters - counts.parameters
    assert counts.trained == counts.parameters
    before, after = (memory_bytes(each, changed(stage=1), MACHINE) for each in (counts, adapted))
    assert after["optimizer"] == 3 * 4 * adapted.trained < before["optimizer"]
    assert after["weights"] == 4 * adapted.parameters
    assert sum(part.gradient_bytes for part in adapted.parts) == 4 * adapted.trained
    # One product backward for each forward where the weights stay as they are, and two in what has none.
    assert counts.forward_flops < adapted.step_flops - adapted.forward_flops < 2 * counts.forward_flops


def test_segments_take_their_time_each_and_offloaded_activations_no_memory(counts):
    changes = ({}, {"segments": 4}, {"segments": 4, "exact": False}, {"checkpointing": True}, {"offloaded": True})
    whole, cut, truncated, again, away = (predict(counts, changed(**fields), MACHINE, CLUSTER) for fields in changes)
    assert sum(truncated.each.values()) == pytest.approx(4 * sum(whole.each.values()))
    assert sum(cut.each.values()) == pytest.approx(4 * sum(again.each.values()))
    assert (away.bytes["activations kept"], away.each) == (0, whole.each)
    assert whole.bytes["activations kept"] > 0


def test_ranks_that_divide_layers_hold_and_compute_a_part(counts):
    part, layout = count(tensor=TensorParallel(0, 2)), changed(tensor=2)
    assert part.parameters == pytest.approx(counts.parameters / 2, rel=0.02)
    assert part.forward_flops == pytest.approx(counts.forward_flops / 2, rel=0.05)
    whole, one = predict(counts, ONE, MACHINE, CLUSTER), predict(part, layout, MACHINE, CLUSTER)
    assert one.bytes["optimizer"] == pytest.approx(whole.bytes["optimizer"] / 2, rel=0.02)
    # Twice what enters and what leaves four parts of layers, the embedding and the loss: half of it there and back.
    size = 64 * 32 * 4
    assert one.each["tensor exchange"] == pytest.approx(12 * (2 * LINKS.latency + size * LINKS.byte))
    assert "parallel.tensor=2" in layout.overrides()
