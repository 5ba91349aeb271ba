"""A small config of every recurrent or hybrid family of transformers: odd sizes, grouped heads, optional parts on."""

from typing import Any

import torch

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
OLMO = DELTA | {"linear_num_key_heads": 4}
QWEN = ATTENTION | DELTA | {"head_dim": 8}
EXPERTS = {
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "num_experts_per_tok": 2,
    "num_experts": 5,
}
MAMBA = {"state_size": 5, "num_hidden_layers": 2, "expand": 2, "conv_kernel": 4, "time_step_rank": 3}
# Bamba, Falcon-H1 and Granite 4.
MAMBA2 = {
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 7,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
LATENT = {
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "qk_nope_head_dim": 8,
    "moe_intermediate_size": 12,
}
LATENT |= {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 40, "num_local_experts": 4}
LATENT |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": QWEN | EXPERTS,
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN | EXPERTS,
    "olmo_hybrid": ATTENTION | OLMO,
    "kimi_linear": LATENT
    | {
        "linear_head_dim": 6,
        "linear_num_heads": 3,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "bailing_hybrid": LATENT
    | {
        "head_dim": 6,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_mtp_layers": 0,
    },
    "mamba": MAMBA | {"use_bias": True},
    "falcon_mamba": MAMBA,
    "mamba2": {
        "num_heads": 6,
        "head_dim": 8,
        "state_size": 7,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "chunk_size": 16,
        "expand": 2,
    },
    "jamba": ATTENTION
    | {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 5,
        "mamba_dt_rank": 3,
    },
    "bamba": ATTENTION | MAMBA2 | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": ATTENTION
    | MAMBA2
    | {
        "num_hidden_layers": 2,
        "mamba_d_ssm": 48,
        "mamba_rms_norm": True,
        "key_multiplier": 0.7,
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
        "mlp_multipliers": [0.8, 0.9],
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.8,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba", "mlp"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "ssm_state_size": 7,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 10,
    },
    "granitemoehybrid": ATTENTION
    | MAMBA2
    | {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "shared_intermediate_size": 20,
        "position_embedding_type": "rope",
        "embedding_multiplier": 1.5,
        "logits_scaling": 1.3,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 7,
        "mamba_ngroups": 2,
        "n_mamba_heads": 6,
        "chunk_size": 16,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": True,
        "adapter_rank": 3,
        "use_mem_rope": True,
        "tie_word_embeddings": True,
    },
    "lfm2": ATTENTION
    | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "attention_window_size": 16,
        "tie_word_embeddings": True,
    },
    "minimax": ATTENTION
    | {
        "num_hidden_layers": 3,
        "head_dim": 6,
        "num_local_experts": 4,
        "block_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "xlstm": {"num_hidden_layers": 2, "num_heads": 3, "chunk_size": 16},
}


def small(family: str, **changes: Any) -> torch.nn.Module:
    """A model of `family` as transformers makes it, with random weights, none of them at its initial constant."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **COMMON | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
