"""The Transformers that can be converted: where each weight of theirs belongs, one table of names per family.

A place is a parameter of `LanguageModel`, or some of its rows: `blocks.{i}.mixer.qkv.weight[q]`. Models whose
attention has been replaced have these parameters too, so one table serves the teacher and every student.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from seqtrain.errors import ConfigError, unknown_name

LLAMA = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.mixer_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.mixer.qkv.weight[q]",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.mixer.qkv.weight[k]",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.mixer.qkv.weight[v]",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.mixer.out.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.mlp_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.mlp.up.weight[gate]",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.mlp.up.weight[value]",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.out.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
QWEN2 = LLAMA | {
    "model.layers.{i}.self_attn.q_proj.bias": "blocks.{i}.mixer.qkv.bias[q]",
    "model.layers.{i}.self_attn.k_proj.bias": "blocks.{i}.mixer.qkv.bias[k]",
    "model.layers.{i}.self_attn.v_proj.bias": "blocks.{i}.mixer.qkv.bias[v]",
}
QWEN3 = LLAMA | {
    "model.layers.{i}.self_attn.q_norm.weight": "blocks.{i}.mixer.q_norm.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "blocks.{i}.mixer.k_norm.weight",
}
# Old files hold the rotation's rates, which follow from the config.
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
# GGUF's names of the same tensors.
GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_q.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blk.{i}.attn_k.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blk.{i}.attn_v.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "blk.{i}.attn_q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blk.{i}.attn_k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Family:
    """What has to be known of an architecture besides its config.

    `weights`: name in the file -> place in the model, `{i}` standing for a layer. `qkv_bias`, `qk_norm`: what its
    attention has. `must_be`: config keys with the only value that can be converted. `gguf_interleaved`: GGUF files
    hold the rows of q and k so that neighbors are rotated together.
    """

    weights: Mapping[str, str]
    qkv_bias: bool = False
    qk_norm: bool = False
    must_be: Mapping[str, Any] = field(default_factory=dict)
    gguf_interleaved: bool = False


# By `model_type`, which for GGUF files is their architecture. SmolLM2 is a llama with tied embeddings.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(LLAMA, must_be={"attention_bias": False, "mlp_bias": False}, gguf_interleaved=True),
    "mistral": Family(LLAMA, gguf_interleaved=True),
    "qwen2": Family(QWEN2, qkv_bias=True),
    "qwen3": Family(QWEN3, qk_norm=True, must_be={"attention_bias": False}),
}


def family_of(model_type: str, where: object) -> Family:
    """The family of `model_type`, which stands in `where`. Raises `ConfigError` listing those there are."""
    if model_type not in FAMILIES:
        raise ConfigError(f"source={where}: " + unknown_name("architecture", model_type, FAMILIES))
    return FAMILIES[model_type]


def in_layers(names: Mapping[str, str], depth: int) -> dict[str, str]:
    """A table of names with every layer's number written out."""
    return {
        name.replace("{i}", str(i)): place.replace("{i}", str(i))
        for name, place in names.items()
        for i in (range(depth) if "{i}" in name else range(1))
    }
