"""Experts under training: losses of the router and biases that are those of the whole batch, however it is divided."""

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.feed_forward import MoE, RouterConfig, activated
from seqtrain.parallel.mesh import Mesh
from seqtrain.runtime.experts import Experts
from seqtrain.runtime.settings import PretrainConfig
from tests.models.tiny import batch
from tests.runtime.runtime_cases import (
    as_it_was_at,
    assert_same_step,
    change,
    grid,
    in_tiers,
    losses,
    records,
    saved_weights,
    short_documents,
    small_config,
    train_on,
)

ROUTER = {"bias": True, "bias_rate": 0.01, "balance": 0.5, "z_loss": 0.1}
EXPERTS = {"experts": 4, "expert_width": 12, "shared_expert_width": 8, "recompute": ("norm", "projection")}


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    """Experts behind a recurrent layer and behind attention, micro-batches of two rows of short documents."""
    return small_config(
        tmp_path,
        "gated_delta_net",
        "attention",
        model={**EXPERTS, "router": RouterConfig(**ROUTER)},
        data={"path": short_documents(tmp_path / "short")},
        train={"steps": 1, "sequence_length": 37, "gradient_clipping": 0.0},
        evaluation={"max_tokens": 148},
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_of_routers(score):
    router = RouterConfig(score=score, balance=0.5, z_loss=0.1)
    model = LanguageModel(ModelConfig(layers=("gla",), depth=2, width=16, heads=2, experts=5, router=router), {}, 40)
    tokens, labels = batch()
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda moe, given, _: seen.append((moe, given[0].flatten(0, 1))))
    model(tokens, labels)
    came = Experts(model, Mesh(0, 1, 0, 1, None, "auto"), torch.device("cpu")).loss()
    expected = 0
    for moe, rows in seen:
        logits = rows @ moe.router.weight.T
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        used = torch.nn.functional.one_hot(scores.topk(2).indices, 5).sum(1).double().mean(0) / 2
        expected = expected + 0.5 * 5 * (used * shares).sum() / 2 + 0.1 * logits.logsumexp(-1).square().mean() / 2
    assert came.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, truth = (torch.autograd.grad(x, moe.router.weight, retain_graph=True)[0] for x in (came, expected))
    assert torch.allclose(ours, truth, atol=1e-7)


@pytest.mark.parametrize("hidden", [12, 13])
def test_each_expert_is_the_mlp_of_its_tokens(hidden):
    """One grouped product of all, or, where sizes are odd, one product of each."""
    torch.manual_seed(0)
    moe = MoE(16, hidden, experts=6, chosen=2, router=RouterConfig())
    for weight in (moe.up, moe.down):
        torch.nn.init.normal_(weight)
    rows = torch.randn(9, 16, requires_grad=True)
    # One without any.
    counts = torch.tensor([2, 0, 4, 1, 1, 1])
    made, d_made = moe.run_experts(rows, counts), torch.randn(9, 16)
    parts = zip(rows.split(counts.tolist()), moe.up, moe.down, strict=True)
    truth = torch.cat([activated(part @ up.T, "silu", True) @ down.T for part, up, down in parts])
    torch.testing.assert_close(made, truth, rtol=1e-5, atol=1e-5)
    leaves = (rows, moe.up, moe.down)
    for came, expected in zip(*(torch.autograd.grad(y, leaves, d_made) for y in (made, truth)), strict=True):
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-4)


def test_a_rate_without_a_bias_is_refused():
    with pytest.raises(ConfigError, match=r"model.router.bias_rate=0.1: .*model.router.bias=true"):
        LanguageModel(ModelConfig(experts=4, router=RouterConfig(bias_rate=0.1)), {}, 40)


LAYOUTS = in_tiers(
    [((1, 2, 1), {}), ((2, 1, 3), {}), ((1, 2, 2), {"segment_tokens": 15})],
    [((1, 4, 0), {}), ((2, 2, 2), {}), ((2, 1, 1), {"segment_tokens": 15}), ((1, 1, 1), {"segment_tokens": 15})],
)


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_a_step_is_that_of_one_rank(config, layouts):
    others = [change(config, f"{mesh}{train}", parallel=grid(*mesh), train=train) for mesh, train in layouts]
    train_on(config, *others)
    [truth] = records(config)
    assert truth["balance_loss"] > 1.0
    assert 0.5 <= truth["largest_expert_share"] <= 1.0
    assert any(bias.abs().sum() > 0 for name, bias in saved_weights(config).items() if name.endswith("mlp.bias"))
    assert_all_same(config, others)


def assert_all_same(config: PretrainConfig, others: list[PretrainConfig]) -> None:
    [truth] = records(config)
    for each in others:
        assert_same_step(each, config)
        [record] = records(each)
        for key in ("balance_loss", "largest_expert_share"):
            assert record[key] == pytest.approx(truth[key], rel=1e-5)
        for name, bias in saved_weights(config).items():
            if name.endswith("mlp.bias"):
                assert torch.equal(saved_weights(each)[name], bias), name


def parallel(data: int, sequence: int, stage: int, experts: int) -> dict[str, int]:
    return {**grid(data, sequence, stage), "experts": experts}


@pytest.mark.parametrize(
    "meshes",
    in_tiers(
        [(1, 2, 1, 2), (2, 1, 0, 2)],
        [(2, 1, 2, 2), (2, 2, 1, 2), (2, 2, 2, 4), (4, 1, 1, 2), (1, 4, 0, 4), (4, 1, 0, 2)],
    ),
)
def test_sharded_experts_are_those_of_one_rank(config, meshes):
    others = [change(config, f"{mesh}", parallel=parallel(*mesh)) for mesh in meshes]
    train_on(config, *others)
    assert_all_same(config, others)


@pytest.mark.all
def test_checkpoints_of_sharded_experts(config):
    """Whole weights, resumed bit for bit, and on any other ranks."""
    clipped = {"steps": 4, "gradient_clipping": 0.5}
    longer = change(config, train=clipped, checkpoint={"every": 2}, parallel=parallel(2, 1, 1, 2))
    alone = change(longer, "alone", parallel=parallel(1, 1, 1, 1))
    train_on(longer, alone)
    assert losses(longer) == pytest.approx(losses(alone), rel=1e-5)
    meshes = {"again": (2, 1, 1, 2), "none": (1, 1, 0, 1), "stage 0": (1, 2, 0, 2)}
    resumed = {name: as_it_was_at(longer, 2, name, parallel=parallel(*mesh)) for name, mesh in meshes.items()}
    train_on(*resumed.values())
    for name, weight in saved_weights(longer).items():
        assert torch.equal(saved_weights(resumed["again"])[name], weight), name
    for each in resumed.values():
        assert losses(each) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.full
def test_truncated_gradients(config):
    truncated = change(config, "truncated", train={"segment_tokens": 15, "segment_gradients": "truncated"})
    train_on(config, truncated)
    [came], [truth] = records(truncated), records(config)
    assert came["balance_loss"] == pytest.approx(truth["balance_loss"], rel=1e-5)
    assert came["largest_expert_share"] == truth["largest_expert_share"]


@pytest.mark.all
def test_a_resumed_run_has_the_same_biases(config):
    longer = change(config, train={"steps": 4}, checkpoint={"every": 2}, parallel=grid(2, 1, 2))
    train_on(longer)
    again = as_it_was_at(longer, 2, "again")
    train_on(again)
    assert losses(again) == losses(longer)
    for name, weight in saved_weights(longer).items():
        assert torch.equal(saved_weights(again)[name], weight), name
