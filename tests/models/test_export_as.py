"""A model made here that has a family's layers is exported as that family, and plain transformers computes the same."""

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.feed_forward import RouterConfig
from seqtrain.models.pretrained import export_as
from tests.command_cases import refused
from tests.models.family_cases import some_tokens

NORMED = {"qk_norm": True, "query_group": 2}
OLMO = {"qk_norm": True, "qk_norm_over": "all"}
QWEN = {"qk_norm": True, "qk_norm_zero_centered": True, "output_gate": True, "rope_width": 4}
HYBRID = ("gated_delta_net", "gated_delta_net", "attention")
CASES = {
    "llama": (("attention",), {}, {}),
    # In how many pieces the loss is computed is the run's to say.
    "phi3": (("attention",), {"loss_chunk": 64}, {"attention": {"query_group": 2}}),
    "qwen3": (("attention",), {"tie_embeddings": False}, {"attention": NORMED}),
    "mistral": (("sliding_attention",), {}, {"sliding_attention": {"window": 9, "query_group": 4}}),
    "mamba2": (("mamba2",), {"mlps": ("none",)}, {"mamba2": {"state": 6}}),
    "granitemoehybrid": (
        ("mamba2", "attention", "mamba2"),
        {"residual_scale": 0.7, "logit_scale": 0.25},
        {"attention": {"query_group": 2, "scale": 0.3}, "mamba2": {"state": 6, "groups": 2, "norm_eps": 1e-6}},
    ),
    "olmo_hybrid": (
        HYBRID,
        {"norms": ("pre", "pre", "post")},
        {"attention": OLMO, "gated_delta_net": {"norm_eps": 1e-5}},
    ),
    "qwen3_next": (
        HYBRID,
        {
            "norm_zero_centered": True,
            "experts": 4,
            "mlps": ("mlp", "moe", "moe"),
            "shared_expert_width": 16,
            "router": RouterConfig(shared_gate=True),
        },
        {"attention": QWEN, "gated_delta_net": {"norm_eps": 1e-6}},
    ),
}


def build(layers, fields, settings):
    torch.manual_seed(0)
    mixers = {name: MIXERS.get(name).Config(**settings.get(name, {})) for name in set(layers)}
    return LanguageModel(ModelConfig(layers=layers, depth=3, width=32, heads=4, **fields), mixers, 61).eval()


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.all if x == "phi3" else ()) for x in CASES])
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model, folder = build(*CASES[name]), tmp_path / name
    folder.mkdir()
    export_as(model, name, folder, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert theirs.config.model_type == name
    assert not any(info.values()), info
    tokens = some_tokens(2, 50)
    torch.testing.assert_close(model(tokens, all_logits=True)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("llama", (("attention",), {}, {"attention": NORMED}), "q_norm has module=RMSNorm"),
        ("llama", (("attention",), {"norms": ("post",)}, {}), "blocks.0.mixer_norm has module=Identity"),
        ("qwen3", (("attention",), {}, {}), "q_norm has module=Identity"),
        ("olmo_hybrid", (HYBRID, {}, {"attention": OLMO}), "blocks.0.mixer has norm_eps=1e-06, not norm_eps=1e-05"),
        ("qwen3_next", (("attention",), {}, {}), "it has no gated_delta_net layers"),
        ("mamba2", (("mamba2",), {}, {}), "blocks.0.mlp has module=MLP, activation=silu"),
        ("llama", (HYBRID, {}, {}), "blocks.0.mixer has module=GatedDeltaNet"),
        ("llama", (("attention",), {"residual_scale": 0.5}, {}), "model.residual_scale=0.5, not 1.0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, case, message):
    with refused(message, ConfigError):
        export_as(build(*case), name, tmp_path)
    assert not list(tmp_path.iterdir())
