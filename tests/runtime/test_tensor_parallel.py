"""Runs whose layers are divided over tensor-parallel ranks: the numbers of one rank, on any layout, and resumed."""

from typing import Any

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.models.feed_forward import RouterConfig
from seqtrain.runtime.checks import check
from seqtrain.runtime.settings import PretrainConfig
from tests.runtime.runtime_cases import (
    as_it_was_at,
    assert_same_step,
    change,
    in_tiers,
    losses,
    saved_weights,
    score,
    short_documents,
    small_config,
    train_on,
)


def mesh(data: int, sequence: int, tensor: int, stage: int, experts: int = 1) -> dict[str, int]:
    return {"data": data, "sequence": sequence, "tensor": tensor, "zero_stage": stage, "experts": experts}


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    """Layers with and without heads, short documents, one step that clips."""
    return small_config(
        tmp_path,
        *("gated_delta_net", "hgrn", "sliding_attention", "attention"),
        data={"path": short_documents(tmp_path / "short")},
        train={"steps": 1, "sequence_length": 37, "gradient_clipping": 0.1},
        evaluation={"max_tokens": 148},
    )


@pytest.mark.parametrize(
    "meshes",
    in_tiers([(1, 1, 2, 1), (1, 1, 2, 0)], [(1, 2, 2, 2), (2, 1, 2, 0), (2, 1, 2, 1), (2, 1, 2, 2), (1, 2, 2, 0)]),
)
def test_a_step_is_that_of_one_rank(config, meshes):
    alone, *others = [change(config, f"{each}", parallel=mesh(*each)) for each in ((1, 1, 1, 1), *meshes)]
    train_on(alone, *others)
    for each in others:
        assert_same_step(each, alone)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1])
def test_experts_are_divided_besides(config, stage):
    router = RouterConfig(bias=True, bias_rate=0.01, balance=0.5, z_loss=0.1)
    sizes: dict[str, Any] = {"experts": 4, "expert_width": 12, "shared_expert_width": 8}
    config = change(config, model={**sizes, "router": router}, train={"gradient_clipping": 0.0})
    meshes = [(1, 1, 1, 1), (1, 1, 2, stage), (2, 1, 2, stage, 2)]
    alone, *others = [change(config, f"{each}", parallel=mesh(*each)) for each in meshes]
    train_on(alone, *others)
    for each in others:
        assert_same_step(each, alone)


@pytest.mark.all
def test_checkpoints_move_between_layouts(config):
    longer = change(config, train={"steps": 4}, checkpoint={"every": 2})
    alone, begun = (change(longer, f"{each}", parallel=mesh(*each)) for each in ((1, 1, 1, 1), (1, 1, 2, 1)))
    train_on(alone, begun)
    assert losses(begun) == pytest.approx(losses(alone), rel=1e-5)
    layouts = {"again": (1, 1, 2, 1), "one": (1, 1, 1, 0), "stage 0": (1, 1, 2, 0)}
    resumed = {name: as_it_was_at(begun, 2, name, parallel=mesh(*each)) for name, each in layouts.items()}
    train_on(*resumed.values())
    saved = {name: saved_weights(each) for name, each in {"begun": begun, **resumed}.items()}
    for name, weight in saved["begun"].items():
        assert torch.equal(saved["again"][name], weight), name
    for each in resumed.values():
        assert losses(each) == pytest.approx(losses(alone), rel=1e-5)
        assert score(each) == pytest.approx(score(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"zero_stage": 3}}, "parallel.tensor=2: .*parallel.zero_stage=3; use parallel.zero_stage=2 or"),
        ({"optimizer": {"name": "muon"}}, "parallel.tensor=2: .*optimizer.name=muon works on; use optimizer=adamw"),
        ({"model": {"heads": 1}}, "model.heads=1: can't be divided by parallel.tensor=2; use parallel.tensor=1"),
        ({"train": {"compile": True}}, "parallel.tensor=2: isn't offered with train.compile=true; leave one"),
    ],
)
def test_what_can_not_be_divided_is_refused(tmp_path, sections, message):
    config = small_config(tmp_path, runtime={"name": "ray"}, parallel={"tensor": 2})
    check(config)
    with pytest.raises(ConfigError, match=message):
        check(change(config, **sections))
