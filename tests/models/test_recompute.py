"""Parts of blocks that are computed again in the backward pass: the same bits, fewer activations."""

import pytest
import torch

from seqtrain.mixers import MIXERS
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error
from tests.models.tiny import HYBRIDS, LAYERS, batch, build
from tests.tiers import half

# From the least that is computed again to the most.
SETS = (("norm",), ("mlp",), ("projection",), ("norm", "mlp"), ("mlp", "projection"), ("block",))
PACKED = SequenceContext(boundaries([30, 0, 40]))
EXPERTS = {"experts": 4, "shared_expert_width": 8}


def gradients(layers, recompute, *, sequence=None, autocast=False, **fields):
    model = build(layers, recompute=recompute, **fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*batch(tokens=70, rows=1), sequence=sequence or SequenceContext())
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **dict(zip(dict(model.named_parameters()), found, strict=True))}


def assert_same_bits(layers, sets, **how):
    kept = gradients(layers, (), **how)
    for recompute in sets:
        again = gradients(layers, recompute, **how)
        assert [name for name in kept if not torch.equal(kept[name], again[name])] == [], recompute


def test_same_bits():
    assert_same_bits(("gated_delta_net", "attention"), [("norm",), ("mlp", "projection")])


@pytest.mark.all
def test_same_bits_of_all_mixers_in_one_model():
    assert_same_bits(tuple(MIXERS.names), [SETS[0], SETS[4]], sequence=PACKED)


@pytest.mark.all
@pytest.mark.parametrize("fields", [{"norms": ("both", "stream")}, EXPERTS, {"groups": (7, 0)}], ids=str)
def test_same_bits_of_every_kind_of_block(fields):
    assert_same_bits(("gla", "attention", "delta_product"), [SETS[0], SETS[4]], sequence=PACKED, **fields)


@pytest.mark.full
@pytest.mark.parametrize(("name", "autocast", "packed"), half(LAYERS, [False, True], [False, True], tier="full"))
def test_same_bits_of_every_mixer(name, autocast, packed):
    assert_same_bits(LAYERS[name], SETS, autocast=autocast, sequence=PACKED if packed else None)


@pytest.mark.all
def test_a_second_backward_pass_over_the_same_graph():
    model = build(HYBRIDS["with attention"], recompute=("mlp", "projection"))
    loss = model(*batch())
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def saved_bytes(recompute, **fields):
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model = build(("gated_delta_net",), recompute=recompute, **fields)
        loss = model(*batch(tokens=200))
    del loss
    return sum(storage.nbytes() for storage in held.values())


def test_inputs_of_operators_are_not_kept():
    kept = saved_bytes(())
    assert saved_bytes(("projection",)) < 0.7 * kept
    assert saved_bytes(("mlp", "projection")) < 0.4 * kept


@pytest.mark.parametrize("recompute", [("block",), pytest.param(("mlp", "projection"), marks=pytest.mark.all)])
def test_inputs_kept_in_bfloat16(recompute):
    layers, half = ("gated_delta_net", "attention"), {"recompute_inputs": "bfloat16"}
    exact, rounded = gradients(layers, recompute), gradients(layers, recompute, **half)
    assert torch.equal(exact["loss"], rounded["loss"]), "what is kept has no part in the forward pass"
    assert relative_error(rounded["blocks.1.mlp.out.weight"], exact["blocks.1.mlp.out.weight"]) > 0
    for name, gradient in exact.items():
        assert relative_error(rounded[name], gradient) < 2e-2, name
    few, many = ([saved_bytes(recompute, depth=depth, **fields) for fields in ({}, half)] for depth in (2, 10))
    share = 0.51 if recompute == ("block",) else 0.8
    assert many[1] - few[1] < share * (many[0] - few[0])
