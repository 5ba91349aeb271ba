"""Steps by a plan: every layer is one of the library's programs, and gives what the whole forward pass gives."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqtrain.kernels.native.build import unavailable
from seqtrain.mixers import MIXERS
from seqtrain.models import decoding
from seqtrain.models.feed_forward import RouterConfig
from seqtrain.models.quantized import quantize
from tests.models import tiny

pytestmark = pytest.mark.skipif(unavailable() is not None, reason="needs the native library")

SETTINGS = {"tcnca": {"chunk": 5}, "sliding_attention": {"window": 5}, "mamba2": {"state": 8}}


def build(*layers, dtype=torch.float64, **fields):
    options = {"depth": len(layers), "width": 32, "initializer_range": 0.3} | fields
    return tiny.build(layers, settings=SETTINGS, dtype=dtype, **options)


def tokens(rows=2, length=20):
    return torch.randint(tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def plan_of(model):
    (plan,) = decoding.plans_of(model)
    assert plan is not None
    return plan


@torch.no_grad()
def walk(model, ids, first=6):
    """The largest error of a step's logits, from the `first` token on."""
    expected, _ = model(ids, all_logits=True)
    _, state = model(ids[:, :first])
    worst = 0.0
    for t in range(first, ids.shape[1]):
        logits, state = model.step(ids[:, t], state)
        worst = max(worst, float((logits - expected[:, t]).abs().max()))
    return worst


def test_every_mixer_is_the_librarys_and_right():
    model = build(*MIXERS.names)
    assert walk(model, tokens()) < 1e-9
    assert plan_of(model).program.why == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_as_near_as_pytorch_is(dtype):
    model = build(*tiny.HYBRIDS["recurrent"], *tiny.HYBRIDS["with attention"], dtype=dtype)
    assert walk(model, tokens()) < (2e-4 if dtype == torch.float32 else 0.3)
    assert plan_of(model).program.why == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"groups": (5, 7), "group_shift": (2, 0)},
        {"experts": 4, "experts_per_token": 2, "router": RouterConfig(score="sigmoid")},
        {"norms": ("both",), "logit_cap": 5.0, "mlp_gated": False, "activation": "relu2"},
        {"tie_embeddings": True, "residual_scale": 0.5, "mlps": ("none", "mlp")},
    ],
    ids=["groups", "experts", "norms", "scales"],
)
def test_blocks_of_other_kinds(fields):
    model = build("gla", "attention", "sliding_attention", "delta_product", **fields).eval()
    assert walk(model, tokens()) < 1e-9
    assert set(plan_of(model).program.why) == ({"forward"} if "experts" in fields else set())


@torch.no_grad()
def test_a_state_stays_as_it_is_and_may_be_gone_on_from_twice():
    model = build("gated_delta_net", "attention", "sliding_attention", "s5")
    ids = tokens()
    _, state = model(ids[:, :6])
    for t in range(6, 9):
        _, state = model.step(ids[:, t], state)
    before = [{name: x.clone() for name, x in layer.items()} for layer in state]
    assert all(type(layer) is dict for layer in copy.deepcopy(state))
    first, after = model.step(ids[:, 9], state)
    first = first.clone()
    other, _ = model.step(ids[:, 10], state)
    again, same = model.step(ids[:, 9], state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for layer, kept in zip([*state, *after], [*before, *same], strict=True):
        assert all(torch.equal(layer[name], x) for name, x in kept.items())


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_integer_weights_are_multiplied_as_torchao_does(weights, rows):
    pytest.importorskip("torchao")
    # Heads of 48: some rows are no whole groups, and no whole vectors.
    model = build("gated_delta_net", "attention", dtype=torch.float32, width=144, heads=3, initializer_range=0.1)
    before, _ = model(tokens(), all_logits=True)
    quantize(model, weights)
    came, _ = model(tokens(), all_logits=True)
    assert not torch.equal(came, before)
    assert (came - before).std() < (0.05 if weights == "int8" else 0.5) * before.std()
    ids = tokens(rows)
    assert walk(model, ids) < 1e-3
    assert plan_of(model).program.why == {}


class Copied(TorchDispatchMode):
    """The most numbers that PyTorch copied at once."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_keys_of_many_rows_are_read_where_they_lie(rows):
    # Heads of 32: whole vectors, and more keys than are summed at a time.
    model = build("attention", "sliding_attention", dtype=torch.float32, width=64)
    ids = tokens(rows, 50)
    assert walk(model, ids, first=30) < 2e-4
    _, state = model(ids[:, :30])
    for t in (30, 31):
        _, state = model.step(ids[:, t], state)
    with pytest.MonkeyPatch.context() as patch:
        # A step under a mode that watches PyTorch is PyTorch's own.
        patch.setattr(decoding, "_served", lambda *_: True)
        with Copied() as copied:
            model.step(ids[:, 32], state)
    assert copied.most <= rows


@torch.no_grad()
def test_weights_that_change_and_modules_that_are_set_otherwise_are_followed():
    model, ids = build("s5", "mamba"), tokens()
    assert walk(model, ids) < 1e-9
    old = plan_of(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    assert walk(model, ids) < 1e-9
    assert plan_of(model) is old
    model.norm.weight.data = 2 * model.norm.weight.data
    assert walk(model, ids) < 1e-9
    model.blocks[0].mixer_norm.eps = 0.5
    assert walk(model, ids) < 1e-9


@torch.no_grad()
def test_what_depends_on_numbers_goes_on_in_pytorch(monkeypatch, caplog):
    model, ids = build("gla"), tokens()
    gate = model.blocks[0].mlp.forward
    monkeypatch.setattr(model.blocks[0].mlp, "forward", lambda x: gate(x) if float(x.sum()) < 1e9 else x)
    with caplog.at_level("INFO", "seqtrain.models"):
        assert walk(model, ids) < 1e-9
    assert "token by token in PyTorch" in caplog.text
    assert decoding.plans_of(model) == [None]
