"""Mixers against other people's code for the same layer: the weights carried over, the outputs must agree."""

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.testing import relative_error

WIDTH, HEADS, TOKENS = 32, 4, 75


def ours(name, **fields):
    torch.manual_seed(1)
    cls = MIXERS.get(name)
    return cls(cls.Config(**fields), LayerShape(WIDTH, HEADS))


def carry(mixer, weights):
    """Copies `weights` into the mixer's parameters of those names: all of them, in their shapes."""
    own = dict(mixer.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            assert own[name].numel() == value.numel(), name
            own[name].copy_(value.view_as(own[name]))


def jiggled(module):
    """Random values for every parameter, so that none hides behind an initial 0 or 1."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1) * 0.5)
    return module.eval()


def assert_same(mixer, expected):
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert relative_error(mixer(x)[0], expected(x)) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    sizes = {"hidden_size": WIDTH, "num_heads": HEADS, "head_dim": 16, "state_size": 8, "n_groups": groups, "expand": 2}
    config = Mamba2Config(**sizes, layer_norm_epsilon=1e-6)
    theirs = jiggled(Mamba2Mixer(config, 0))
    mixer = ours("mamba2", state=8, groups=groups)
    weights = {
        "project.weight": theirs.in_proj.weight,
        "conv.weight": theirs.conv1d.weight,
        "conv.bias": theirs.conv1d.bias,
        "rate_log": theirs.A_log,
        "step_bias": theirs.dt_bias,
        "skip": theirs.D,
        "norm.weight": theirs.norm.weight,
        "out.weight": theirs.out_proj.weight,
    }
    carry(mixer, weights)
    assert_same(mixer, theirs)


def test_gated_delta_net():
    heads = {"linear_num_value_heads": HEADS, "linear_num_key_heads": HEADS}
    widths = {"hidden_size": WIDTH, "linear_key_head_dim": 6, "linear_value_head_dim": 12}
    config = Qwen3NextConfig(**heads, **widths, rms_norm_eps=1e-6)
    theirs = jiggled(Qwen3NextGatedDeltaNet(config, 0))
    # Theirs are ordered head by head: q, k, v, z of the first, then of the second.
    heads = theirs.in_proj_qkvz.weight.view(HEADS, 36, WIDTH).split([6, 6, 12, 12], 1)
    q, k, v, gate = (part.flatten(0, 1) for part in heads)
    beta, decay = theirs.in_proj_ba.weight.view(HEADS, 2, WIDTH).unbind(1)
    mixer = ours("gated_delta_net")
    weights = {
        "qkv.linear.weight": torch.cat([q, k, v]),
        "qkv.conv.weight": theirs.conv1d.weight,
        "beta.weight": beta,
        "decay.weight": decay,
        "rate_log": theirs.A_log,
        "step_bias": theirs.dt_bias,
        "gate.weight": gate,
        "norm.norm.weight": theirs.norm.weight,
        "out.weight": theirs.out_proj.weight,
    }
    carry(mixer, weights)
    assert_same(mixer, theirs)


def test_kimi_delta_attention():
    config = KimiLinearConfig(hidden_size=WIDTH, linear_num_heads=HEADS, linear_head_dim=8, rms_norm_eps=1e-6)
    theirs = jiggled(KimiLinearDeltaAttention(config, 0))
    gate = theirs.forget_gate
    mixer = ours("kda")
    weights = {
        "qkv.linear.weight": torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
        "qkv.conv.weight": theirs.conv1d.weight,
        "beta.weight": theirs.b_proj.weight,
        "decay.0.weight": gate.f_a_proj.weight,
        "decay.1.weight": gate.f_b_proj.weight,
        "rate_log": gate.A_log,
        "step_bias": gate.dt_bias,
        "gate.0.weight": theirs.g_a_proj.weight,
        "gate.1.weight": theirs.g_b_proj.weight,
        "norm.norm.weight": theirs.o_norm.weight,
        "out.weight": theirs.o_proj.weight,
    }
    carry(mixer, weights)
    assert_same(mixer, theirs)


def test_attention_with_grouped_queries():
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=WIDTH, attn_implementation="eager", **heads)
    theirs = jiggled(LlamaAttention(config, 0))
    mixer = ours("attention", query_group=2)
    qkv = torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight])
    carry(mixer, {"qkv.weight": qkv, "out.weight": theirs.o_proj.weight})

    def expected(x):
        places = torch.arange(TOKENS)[None]
        mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
        return theirs(x, position_embeddings=LlamaRotaryEmbedding(config)(x, places), attention_mask=mask)[0]

    assert_same(mixer, expected)
