"""Optimizers besides AdamW: the published updates, of whole matrices, the same however a run is divided; resume."""

import importlib.util

import pytest
import torch

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.feed_forward import RouterConfig
from seqtrain.models.matrices import matrices_of
from seqtrain.runtime.checkpoint import find
from seqtrain.runtime.checks import check
from seqtrain.runtime.loading import open_run
from seqtrain.runtime.matrix_rules import RULES, MatrixOptimizer, sinkhorn
from seqtrain.runtime.optimizers import OPTIMIZERS, OptimizerConfig
from seqtrain.runtime.whole_matrices import deal
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    folder_of,
    grid,
    in_tiers,
    losses,
    records,
    saved_moments,
    saved_weights,
    score,
    small_config,
    train_on,
)

MATRIX = ["muon", "soap", "aro", "dct_adamw"]
STEADY = {"name": "constant"}
FULL = pytest.mark.full


def skip_without(*names):
    """Where a library isn't there, which the project's own environment has."""
    for name in names:
        module = OPTIMIZERS[name].module
        if module and not importlib.util.find_spec(module):
            pytest.skip(f"needs {module}")


def optimizer(name, **options):
    """Sizes and rates that fit the tests' models."""
    fitting = {
        "muon": {"dtype": "float32"},
        "soap": {"precondition_every": 2},
        "dct_adamw": {"rank": 4},
        "lion": {"lr": 1e-3, "betas": (0.9, 0.99)},
    }
    return {"name": name, **fitting.get(name, {}), **options}


def run_with(tmp_path, name, *layers, **sections):
    schedule = {"schedule": STEADY} if name == "schedule_free" else {}
    layers = layers or ("gated_delta_net", "attention")
    return small_config(tmp_path, *layers, **{"optimizer": optimizer(name), **schedule, **sections})


def orthogonalized(gradient):
    """Jordan's five iterations (2024), as torch.optim.Muon documents them, in float64."""
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
    return x


def near(came, expected, tolerance):
    return (came - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_is_torchs(shape):
    gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Muon([weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ours = {
        dtype: MatrixOptimizer(RULES["muon"], *shape, OptimizerConfig(dtype=dtype)) for dtype in ("bfloat16", "float32")
    }
    in_float64 = MatrixOptimizer(RULES["muon"], *shape, OptimizerConfig(dtype="float32"))
    mean = torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        before, weight.grad = weight.detach().clone(), gradient.clone()
        theirs.step()
        mean = mean.lerp(gradient.double(), 0.05)
        exact = -0.1 * 0.2 * 10**0.5 * orthogonalized(gradient.double().lerp(mean, 0.95))
        assert torch.allclose(ours["float32"].change(gradient, 0.1).double(), exact, rtol=0, atol=1e-6)
        assert near(in_float64.change(gradient.double(), 0.1), exact, 1e-12)
        assert near(ours["bfloat16"].change(gradient, 0.1), weight.detach() - before, 1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_aro_is_as_published(shape):
    gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = MatrixOptimizer(RULES["aro"], *shape, OptimizerConfig())
    mean, rotation = torch.zeros(6, 10, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for gradient in gradients:
        mean = 0.95 * mean + 0.05 * (gradient if shape == (6, 10) else gradient.T)
        crossed = mean @ sinkhorn(rotation.T @ mean).T
        # Gram-Schmidt from the first column on, which QR is.
        columns = []
        for column in crossed.T:
            for other in columns:
                column = column - (other @ column) * other
            columns.append(column / column.norm())
        rotation = torch.stack(columns, 1)
        update = -0.1 * 0.2 * rotation @ sinkhorn(rotation.T @ mean)
        came = ours.change(gradient, 0.1)
        assert near(came, update if shape == (6, 10) else update.T, 1e-9)
        assert came.square().mean().sqrt() == pytest.approx(0.02)


def test_sinkhorn_evens_rows_and_columns():
    made = sinkhorn(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(made.square().mean(0), torch.ones(10), atol=1e-4)
    assert torch.allclose(made.square().mean(1), torch.ones(6), atol=1e-2)


@pytest.mark.all
@pytest.mark.parametrize("name", ["soap", "dct_adamw"])
def test_libraries_rules(name):
    """Against the formulas, where all of a small matrix is kept: Adam after a change of basis."""
    skip_without(name)
    gradients = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    ours = MatrixOptimizer(RULES[name], 6, 6, OptimizerConfig(rank=6, precondition_every=100, betas=(0.9, 0.95)))
    if name == "soap":
        # The first step only makes the bases.
        first, *gradients = gradients
        assert not ours.change(first.clone(), 0.1).any()
        left, right = (torch.linalg.eigh(each.double())[1].flip(1) for each in (first @ first.T, first.T @ first))
    else:
        number = torch.arange(6, dtype=torch.float64)
        right = (2 / 6) ** 0.5 * torch.cos(torch.pi * (2 * number + 1) * number[:, None] / 12)
        right[0] *= 0.5**0.5
        left = torch.eye(6, dtype=torch.float64)
    mean, square = torch.zeros(2, 6, 6, dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        turned = left.T @ gradient.double() @ right
        mean, square = 0.9 * mean + 0.1 * turned, 0.95 * square + 0.05 * turned.square()
        scale = (1 - 0.95**step) ** 0.5 / (1 - 0.9**step)
        assert near(ours.change(gradient.clone(), 0.1), -0.1 * scale * left @ (mean / square.sqrt()) @ right.T, 1e-3)


def test_which_weights_are_matrices():
    layers = ("gated_delta_net", "attention")
    config = ModelConfig(layers=layers, depth=2, width=16, heads=2, experts=3, expert_width=4, router=RouterConfig())
    model = LanguageModel(config, {}, 40)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: blocks for parameter, blocks in matrices_of(model).items()}
    assert all(block.weight == name for name, blocks in found.items() for block in blocks)
    kinds = {name.split(".", 2)[2] for name in found}
    assert kinds == {"mixer.qkv.linear.weight", "mixer.qkv.weight", "mixer.out.weight", "mlp.up", "mlp.down"}
    # Heads of queries, keys, values; experts, each with its gate's and its values' matrix.
    assert [(block.rows, block.columns) for block in found["blocks.1.mixer.qkv.weight"]] == 6 * [(8, 16)]
    assert [(block.rows, block.columns) for block in found["blocks.0.mlp.up"]] == 6 * [(4, 16)]
    assert [block.number for block in found["blocks.0.mlp.down"]] == [0, 1, 2]
    gated = LanguageModel(ModelConfig(layers=("mamba2",), depth=1, width=16, heads=2), {}, 40)
    blocks = {block.weight: block for each in matrices_of(gated).values() for block in each if block.gate}
    assert set(blocks) == {"blocks.0.mixer.project.weight"}


def test_every_rank_has_about_as_much_to_do():
    owners = deal([8, 1, 5, 3, 3, 4], 3)
    load = [
        sum(cost for cost, owner in zip([8, 1, 5, 3, 3, 4], owners, strict=True) if owner == rank) for rank in range(3)
    ]
    assert load == [8, 8, 8]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"optimizer": {"name": "muon", "implementation": "deepspeed"}}, "deepspeed: has no muon; use optimizer.imp"),
        ({"optimizer": {"name": "schedule_free"}}, "a rate that falls, as schedule.name=cosine; use constant"),
        ({"optimizer": {"name": "schedule_free", "betas": (0.0, 0.9)}, "schedule": STEADY}, "needs the first above 0"),
    ],
)
def test_what_can_not_be_is_one_line(tmp_path, sections, line):
    skip_without("schedule_free")
    with pytest.raises(ConfigError, match=line.replace(".", r"\.")):
        check(small_config(tmp_path, **sections))


def test_a_library_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"name=dct_adamw: needs another package: pip install --no-deps ista-"):
        check(small_config(tmp_path, optimizer={"name": "dct_adamw"}))


# Directions in which a first gradient is zero have a basis of rounding's choice: soap's eigenvectors, aro's QR.
TOLERANCE = {"muon": 1e-6, "schedule_free": 1e-6, "soap": 1e-2, "aro": 1e-4, "dct_adamw": 1e-6, "lion": 1e-6}
EVERY = [(2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3)]
CASES = [
    pytest.param("muon", [(1, 2, 3)], [(2, 1, 1)], marks=pytest.mark.all),
    pytest.param("schedule_free", [(2, 1, 1)], [(1, 1, 3)], marks=pytest.mark.all),
    *(pytest.param(name, EVERY, [(1, 1, 0), (2, 1, 2), (1, 1, 3)], marks=FULL) for name in TOLERANCE),
]


@pytest.mark.parametrize(("name", "meshes", "elsewhere"), CASES)
def test_runs_are_the_same_on_every_mesh_and_stage_and_resume(tmp_path, name, meshes, elsewhere):
    skip_without(name)
    alone, *others = configs = [
        change(run_with(tmp_path, name), f"{mesh}", parallel=grid(*mesh)) for mesh in [(1, 1, 0), *meshes]
    ]
    train_on(*configs)
    assert losses(alone)[-1] < losses(alone)[0] - 0.05
    for config in others:
        assert losses(config) == pytest.approx(losses(alone), rel=TOLERANCE[name]), config.parallel
        assert score(config) == pytest.approx(score(alone), rel=TOLERANCE[name]), config.parallel
    again = [as_it_was_at(config, 3, f"{folder_of(config).path.name}-again") for config in others]
    moved = [as_it_was_at(others[-1], 3, f"on-{mesh}", parallel=grid(*mesh)) for mesh in elsewhere]
    train_on(*again, *moved)
    for config, whole in zip(again, others, strict=True):
        assert losses(config) == losses(whole), config.parallel
        assert score(config) == score(whole)
    for config in moved:
        assert losses(config) == pytest.approx(losses(others[-1]), rel=1e-6), config.parallel


@pytest.mark.parametrize("stages", in_tiers((2,), (0, 1, 3)))
def test_the_first_update_is_of_whole_matrices(tmp_path, stages):
    base = run_with(tmp_path, "muon", train={"steps": 1}, optimizer=optimizer("muon", lr=0.0))
    still, *moved = [
        change(base, f"{lr}-{stage}", optimizer={"lr": lr}, parallel=grid(2, 1, stage))
        for lr, stage in [(0.0, 0), *((0.1, stage) for stage in stages)]
    ]
    train_on(still, *moved)
    begin = saved_weights(still)
    for config in moved:
        saved = find(folder_of(config).checkpoints)
        after = saved.state_dict()
        rate = records(config)[0]["lr"]
        states = saved.tensors().states("blocks.1.mixer.qkv.weight", range(6))
        for number in range(6):
            # Momentum is a twentieth of the first gradient.
            mean = states[number]["momentum_buffer"]
            rows = slice(8 * number, 8 * number + 8)
            before, now = (each["blocks.1.mixer.qkv.weight"][rows].double() for each in (begin, after))
            expected = -rate * (0.2 * 16**0.5 * orthogonalized(mean) + 0.1 * before)
            assert near(now - before, expected, 1e-5)


@pytest.mark.parametrize("stages", in_tiers((2,), (0, 1)))
def test_experts_one_by_one(tmp_path, stages):
    base = run_with(tmp_path, "muon", "gated_delta_net", model={"experts": 4, "expert_width": 12})
    alone = change(base, "alone", parallel={**grid(1, 1, 1), "experts": 1})
    sharded = [change(base, f"{stage}", parallel={**grid(2, 1, stage), "experts": 2}) for stage in stages]
    train_on(alone, *sharded)
    again = as_it_was_at(sharded[-1], 3, "again")
    whole = as_it_was_at(sharded[-1], 3, "whole", parallel={**grid(1, 1, 3), "experts": 1})
    train_on(again, whole)
    for config in (*sharded, whole):
        assert losses(config) == pytest.approx(losses(alone), rel=1e-6), config.parallel
    assert losses(again) == losses(sharded[-1])


@pytest.mark.all
def test_schedule_free_leaves_its_averages(tmp_path):
    skip_without("schedule_free")
    config = run_with(tmp_path, "schedule_free", train={"steps": 3}, evaluation={"every": 2})
    plain = change(config, "unwatched", evaluation={"every": 0})
    train_on(config, plain)
    assert losses(config) == losses(plain), "looking at the averages must leave the training as it is"
    saved = find(folder_of(config).checkpoints)
    zs, ys = saved_moments(saved, "z"), saved_moments(saved, "y")
    _, model, _ = open_run(folder_of(config).path)
    for name, weight in model.named_parameters():
        z, y = zs[name], ys[name]
        assert torch.allclose(0.9 * weight + 0.1 * z, y, atol=1e-6), name
    assert not torch.equal(weight, y)


@pytest.mark.all
def test_another_optimizers_state_is_refused(tmp_path):
    config = run_with(tmp_path, "muon", train={"steps": 2})
    train_on(config)
    other = change(
        config,
        "other",
        optimizer={"name": "aro"},
        checkpoint={"resume": str(find(folder_of(config).checkpoints).folder)},
    )
    with pytest.raises(CheckpointError, match=r'was made with optimizer\.name="muon", now "aro"'):
        train_on(change(other, train={"steps": 4}))
