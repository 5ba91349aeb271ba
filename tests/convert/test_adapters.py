"""LoRA on fused matrices: nothing changes when adapters are added, and little when they are merged."""

import pytest
import torch

from seqtrain.convert.adapters import TARGETS, add_adapters, merged_weights
from seqtrain.testing import relative_error
from tests.convert.convert_cases import read_teacher, some_tokens


@pytest.fixture
def model(transformers_on_disk):
    return read_teacher(transformers_on_disk("qwen2")[1]).requires_grad_(False)


def adapted(model, size):
    """`model` with adapters on every matrix, whose products are of about `size`."""
    add_adapters(model, rank=2, alpha=2, targets=tuple(TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.fill_(1.0)
            elif "lora_B" in name:
                parameter.copy_(size / 2 * torch.randn(len(parameter), 1).sign().expand_as(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(some_tokens(2, 20), all_logits=True)[0]


def test_new_adapters_change_nothing_and_are_all_that_is_trained(model):
    before, names = logits(model), {name for name, _ in model.named_parameters()}
    add_adapters(model, rank=3, alpha=6, targets=("q", "v", "down"))
    assert relative_error(logits(model), before) < 1e-6
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 3 * len(model.blocks)
    assert {parameter.shape[0] for name, parameter in trained.items() if "lora_A" in name} == {3}
    assert {parameter.shape[1] for name, parameter in trained.items() if "lora_B" in name} == {3}
    assert set(merged_weights(model)) == names


def test_merged_weights_compute_what_the_adapters_did(model):
    original = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = logits(model)
    expected = logits(adapted(model, 0.05))
    assert relative_error(expected, before) > 0.1
    merged = merged_weights(model)
    assert all(merged[name].shape == value.shape for name, value in original.items())
    fresh = type(model)(model.config, {"attention": model.blocks[0].mixer.config}, model.vocab_size)
    fresh.load_state_dict(merged, strict=False)
    assert relative_error(logits(fresh), expected) < 1e-5


def test_small_updates_survive_merging(model):
    """In bfloat16 much of an update of 5e-4 is lost in the sum; in float32 nothing is."""
    name = "blocks.1.mixer.out.weight"
    base = dict(model.named_parameters())[name].clone()
    adapted(model, 5e-4)
    wanted = merged_weights(model)[name] - base
    assert wanted.abs().mean().item() == pytest.approx(5e-4, rel=0.01)
    in_half = (base.bfloat16() + wanted.bfloat16()).float() - base.bfloat16().float()
    assert relative_error(in_half, wanted) > 0.2
    # Weights that are bfloat16 themselves are merged in float32 all the same.
    model.to(torch.bfloat16)
    came = merged_weights(model)[name]
    assert came.dtype == torch.float32
    update = came - base.bfloat16().float()
    assert relative_error(update, wanted) < 1e-2
