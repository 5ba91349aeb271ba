"""A checkpoint of three ranks is the same on any others, in every stage and split; none reads more than its share."""

import math

import pytest
import torch

from seqtrain.parallel.mesh import form_mesh
from seqtrain.runtime import worker
from seqtrain.runtime.checkpoint import find
from seqtrain.runtime.restoring import Restoration
from seqtrain.runtime.slices import Parts
from tests.runtime.runtime_cases import change, folder_of, in_tiers, on_ranks, session_for, small_config, train_on


def layout(data, stage, tensor=1, shard=None, experts=1):
    return {
        "data": data,
        "zero_stage": stage,
        "tensor": tensor,
        "shard": shard or data,
        "experts": experts,
    }


def restored(ranks, session, found):
    """What this rank has and writes of a run that goes on from `found`; and how many bytes it has read."""
    parallel, read = session.config.parallel, []

    class Counted(Restoration):
        def agree(self):
            super().agree()
            read.append(self.bytes)

    worker.Restoration = Counted
    sizes = {key: getattr(parallel, key) for key in ("sequence", "tensor", "experts", "algorithm")}
    with form_mesh(ranks.group, shard=parallel.shard_ranks, device=ranks.device, timeout_seconds=60, **sizes) as mesh:
        state = worker._restore_from(found, session, ranks, mesh, session.lease, lambda: None)
        engine = state.engine
        held = [
            (each.name, each.begin, each.cuts, {key: value.clone() for key, value in each.values.items()})
            for each in engine.pieces(moments=True)
        ]
        return held, dict(engine.optimizer_state.states()), engine.shapes(), read[0]


def assert_same_everywhere(found, config):
    """On the ranks of `config`, `found` is what it was, each number held once, and read by few."""
    session = session_for(config)
    count = config.parallel.ranks
    outcomes = on_ranks(count, restored, session, found)
    session.lease.release()
    shapes, tensors = found.manifest.shapes, found.tensors()
    numbers = sum(map(math.prod, shapes.values()))
    largest = max(4 * math.prod(shape) for shape in shapes.values())
    came = {}
    for held, _, told, read in outcomes:
        assert told == shapes
        for name, begin, cuts, values in held:
            part = Parts(shapes[name], cuts)
            for key, value in values.items():
                whole = came.setdefault((name, key), torch.full((math.prod(shapes[name]),), torch.nan))
                places = part.places(torch.arange(begin, begin + len(value)))
                assert whole[places].isnan().all(), "each number once"
                whole[places] = value
        assert read <= 12 * numbers / count + 2 * largest, (config.parallel, read, numbers)
    for (name, key), value in came.items():
        assert torch.equal(value, tensors.range(name, key, 0, len(value))), (name, key, config.parallel)
    assert {name for name, _ in came} == shapes.keys()
    states = {key: value for _, own, _, _ in outcomes for key, value in own.items()}
    return len(came), states


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_config(
        tmp_path_factory.mktemp("restoring"),
        *("gated_delta_net", "attention"),
        model={"width": 128, "heads": 4},
        train={"steps": 1, "batch_size": 60, "micro_batch_size": 1, "sequence_length": 16},
        evaluation={"max_tokens": 16},
        sample={"tokens": 0},
    )


def saved_with(config, name, **parallel):
    saved = change(config, name, parallel=layout(**parallel))
    train_on(saved)
    return find(folder_of(saved).checkpoints)


LOADED = {
    "one": layout(1, 0),
    "two in stage 3": layout(2, 3),
    "five in stage 2": layout(5, 2),
    "tensor and data": layout(2, 2, tensor=2),
    "replicas": layout(4, 3, shard=2),
}
GRID = {f"{count} in stage {stage}": layout(count, stage) for count in (1, 2, 4, 5) for stage in range(4)}
TENSOR = {
    f"{count} x tensor in stage {stage}": layout(count, stage, tensor=2) for count in (1, 2) for stage in range(3)
}


@pytest.mark.parametrize(
    ("stage", "loaded"),
    [
        pytest.param(1, LOADED, marks=pytest.mark.all, id="1"),
        *(pytest.param(stage, GRID | TENSOR, marks=pytest.mark.full, id=f"all of {stage}") for stage in range(4)),
    ],
)
def test_what_three_ranks_saved_is_the_same_on_any_others(small, stage, loaded):
    found = saved_with(small, f"three-{stage}-{len(loaded)}", data=3, stage=stage)
    assert len(found.manifest.files) == 3
    for name, parallel in loaded.items():
        count, _ = assert_same_everywhere(found, change(small, f"{stage}-{name}", parallel=parallel))
        assert count == 3 * len(found.manifest.shapes), "weights and two moments"


@pytest.mark.parametrize("stages", in_tiers((1,), (0, 2)))
def test_what_tensor_ranks_and_replicas_saved_is_the_same_on_any_others(small, stages):
    for stage in stages:
        found = saved_with(small, f"divided-{stage}", data=2, stage=stage, tensor=2)
        for name, parallel in {"three": layout(3, 3), "two": layout(1, 0, tensor=2)}.items():
            assert_same_everywhere(found, change(small, f"divided-{stage}-{name}", parallel=parallel))
        if stage:
            found = saved_with(small, f"replicas-{stage}", data=4, stage=stage, shard=2)
            assert_same_everywhere(found, change(small, f"replicas-{stage}-3", parallel=layout(3, stage)))


@pytest.mark.all
def test_states_of_matrices_are_the_same_on_any_others(small):
    muon = change(small, optimizer={"name": "muon"})
    found = saved_with(muon, "muon", data=3, stage=2)
    expected = None
    for name, parallel in {"again": layout(3, 2), "one": layout(1, 0), "all of two": layout(2, 0)}.items():
        _, states = assert_same_everywhere(found, change(muon, f"muon-{name}", parallel=parallel))
        expected = expected or states
        assert states.keys() == expected.keys()
        assert len(states) > 10
        assert all(torch.equal(value, expected[key]) for key, value in states.items())
