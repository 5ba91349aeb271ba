"""Blocks that several layers share: one set of weights, each use's own adapters, counted and saved as that."""

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.models.huggingface import SeqtrainForCausalLM
from seqtrain.models.huggingface_config import SeqtrainConfig
from seqtrain.models.language_model import LanguageModel
from seqtrain.models.shared import SharedConfig
from seqtrain.planning.counts import ModelCounter
from tests.command_cases import refused
from tests.models import tiny

SHARED = SharedConfig(layers=(0, 1, 1), adapter_rank=3)


def build(**fields) -> LanguageModel:
    return tiny.build(("gla",), depth=6, shared=SHARED, **fields)


@pytest.mark.all
def test_layers_of_a_block_hold_its_weights_once():
    model = build()
    first, second = (model.blocks[index].shared for index in (1, 5))
    assert first.attention.qkv.weight is second.attention.qkv.weight
    assert first.mlp.up.weight is second.mlp.up.weight
    assert first.out.weight is not second.out.weight
    own = sum(weight.numel() for weight in (*first.out.parameters(), *first.mlp.adapter.parameters()))
    shared = sum(weight.numel() for weight in first.parameters()) - own
    plain = tiny.build(("gla",), depth=6)
    assert model.parameter_count() - plain.parameter_count() == shared + 4 * own
    assert model.flops(50) - plain.flops(50) == 4 * first.flops(50)
    counts = ModelCounter(model.config, {}, model.vocab_size).count(50)
    assert counts.parameters == model.parameter_count()
    assert counts.forward_flops == model.flops(50)


@pytest.mark.all
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_as_our_own_type_they_are_shared_again(tmp_path, tied):
    model = build(tie_embeddings=tied)
    wrapped = SeqtrainForCausalLM(SeqtrainConfig.of(model.config, {}, model.vocab_size))
    wrapped.model.load_state_dict(model.state_dict())
    wrapped.save_pretrained(tmp_path)
    found = SeqtrainForCausalLM.from_pretrained(tmp_path).model
    assert found.blocks[1].shared.attention.qkv.weight is found.blocks[4].shared.attention.qkv.weight
    tokens, _ = tiny.batch()
    assert torch.equal(found(tokens, all_logits=True)[0], model(tokens, all_logits=True)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"shared": SharedConfig(layers=(1,), mixer="gla")},
            "model.shared.mixer=gla: must be one of softmax attention",
        ),
        ({"groups": (0, 8)}, "model.shared.layers=[0, 1, 1]: layer 1 needs a mixer, and no groups"),
    ],
)
def test_what_can_not_be_shared_is_refused(fields, message):
    with refused(message, ConfigError):
        tiny.build(("gla",), depth=6, **{"shared": SHARED, **fields})
