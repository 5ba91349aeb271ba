"""Tiny random models of every family as transformers makes and saves them: odd sizes, every optional part on."""

import copy

import torch
from safetensors.torch import load_file

from seqtrain.models.pretrained import places_in

COMMON = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
MAMBA2 = {
    "mamba_n_heads": 6, "mamba_d_head": 12, "mamba_n_groups": 3, "mamba_d_state": 10, "mamba_d_conv": 3,
    "mamba_chunk_size": 16, "mamba_proj_bias": True, "attention_bias": True, "head_dim": 12,
}  # fmt: skip
LAYERS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
PURE_MAMBA2 = {
    "num_heads": 6, "head_dim": 12, "n_groups": 3, "state_size": 10, "conv_kernel": 3, "chunk_size": 16,
    "use_bias": True, "use_conv_bias": False, "time_step_limit": (0.01, 0.9),
}  # fmt: skip
MAMBA = {"state_size": 5, "time_step_rank": 4, "conv_kernel": 3, "use_bias": True, "tie_word_embeddings": False}
JAMBA = {
    "mamba_d_state": 5, "mamba_d_conv": 3, "mamba_dt_rank": 4, "mamba_proj_bias": True, "num_experts": 5,
    "attn_layer_period": 3, "attn_layer_offset": 1,
}  # fmt: skip
GRANITE = {
    **MAMBA2,
    "layer_types": LAYERS, "position_embedding_type": "rope", "shared_intermediate_size": 20,
    "num_local_experts": 5, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
    "logits_scaling": 2.0, "attention_multiplier": 0.4, "tie_word_embeddings": True,
}  # fmt: skip
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 6,
    "mamba_head_dim": 14, "n_groups": 3, "ssm_state_size": 10, "conv_kernel": 3, "chunk_size": 16,
    "n_routed_experts": 6, "n_group": 3, "topk_group": 2, "moe_intermediate_size": 12, "use_bias": True,
    "moe_shared_expert_intermediate_size": 20, "moe_latent_size": 16, "routed_scaling_factor": 1.5,
}  # fmt: skip
GEMMA = {
    "layer_types": 2 * ["sliding_attention", "full_attention"], "sliding_window": 9, "attention_bias": True,
    "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 13,
}  # fmt: skip
FALCON_H1 = {
    **MAMBA2,
    "mamba_d_ssm": 72, "mamba_rms_norm": True, "projectors_bias": True, "mlp_bias": True,
    "lm_head_multiplier": 0.7, "embedding_multiplier": 2.0, "mlp_multipliers": [0.8, 1.3],
    "key_multiplier": 0.6, "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.2,
    "ssm_multipliers": [0.5, 1.5, 0.9, 1.1, 0.7], "ssm_in_multiplier": 1.4, "ssm_out_multiplier": 0.8,
}  # fmt: skip
MINIMAX = {
    "layer_types": LAYERS, "block_size": 16, "num_local_experts": 5, "full_attn_alpha_factor": 1.7,
    "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.3, "linear_attn_beta_factor": 1.1,
    "mlp_alpha_factor": 1.2, "mlp_beta_factor": 0.9, "sliding_window": 11,
    # Its cache forgets the window.
    "use_cache": False,
}  # fmt: skip
ZAMBA2 = {
    "layers_block_type": ["linear_attention", *3 * ["hybrid"], "linear_attention", "hybrid"], "num_hidden_layers": 6,
    "num_mem_blocks": 2, "use_shared_attention_adapter": True, "adapter_rank": 5, "use_mem_rope": True,
    "num_key_value_heads": 6, "mamba_d_state": 10, "mamba_d_conv": 3, "mamba_ngroups": 3, "n_mamba_heads": 6,
    "chunk_size": 16, "add_bias_linear": True,
}  # fmt: skip
XLSTM = {
    "num_heads": 6, "v_dim_factor": 1.5, "gate_soft_cap": 8.0, "output_logit_soft_cap": 5.0, "norm_eps": 1e-4,
    "ffn_round_up_to_multiple_of": 7, "chunk_size": 16,
    # Its cache takes widths of whole multiples of 64 alone.
    "use_cache": False,
}  # fmt: skip
LATENT = {
    "layer_types": LAYERS, "num_key_value_heads": 6, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "qk_nope_head_dim": 10, "attention_bias": True, "num_local_experts": 6, "num_experts_per_tok": 2, "n_group": 3,
    "topk_group": 2, "moe_intermediate_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
KIMI = {**LATENT, "q_lora_rank": 14, "linear_head_dim": 10, "linear_num_heads": 4, "linear_conv_kernel_dim": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.9}
BAILING = {
    **LATENT,
    "head_dim": 10, "short_conv_kernel_size": 3, "rope_parameters": {"rope_theta": 5e4, "mscale_all_dim": 0.7, **YARN},
}  # fmt: skip
# By a name of ours: what transformers calls the family's classes, and its config.
CASES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "phi3": ("Phi3", {"num_key_value_heads": 3, "sliding_window": 9, "partial_rotary_factor": 0.75}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 0.3}),
    "gemma3_text": ("Gemma3", GEMMA),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "lru_width": 48,
            "attention_window_size": 9,
            "attention_bias": True,
            "logits_soft_cap": 5.0,
            "conv1d_width": 3,
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.67},
            "use_cache": False,
        },
    ),
    "lfm2": (
        "Lfm2",
        {
            "layer_types": 2 * ["conv", "full_attention"],
            "conv_bias": True,
            "conv_L_cache": 4,
            "norm_eps": 1e-3,
            "block_multiple_of": 7,
            "block_ffn_dim_multiplier": 1.3,
            "intermediate_size": 61,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": ("Olmo3", {"sliding_window": 9}),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "attention_bias": True}),
    "qwen3_next": ("Qwen3Next", {**DELTA, **EXPERTS, "partial_rotary_factor": 0.4, "mlp_only_layers": [1]}),
    "qwen3_5": ("Qwen3_5", {**DELTA, "partial_rotary_factor": 0.4}),
    "mamba2": ("Mamba2", PURE_MAMBA2),
    "mamba": ("Mamba", {**MAMBA, "use_conv_bias": False}),
    "falcon_mamba": ("FalconMamba", {**MAMBA, "mixer_rms_eps": 1e-3}),
    "xlstm": ("xLSTM", XLSTM),
    "jamba": ("Jamba", JAMBA),
    "zamba2": ("Zamba2", ZAMBA2),
    "zamba2_plain": (
        "Zamba2",
        {**ZAMBA2, "num_key_value_heads": 2, "use_shared_attention_adapter": False, "use_mem_rope": False},
    ),
    "bamba": ("Bamba", {**MAMBA2, "attn_layer_indices": [1, 3], "mlp_bias": True}),
    "granitemoehybrid": ("GraniteMoeHybrid", GRANITE),
    "granite_dense": (
        "GraniteMoeHybrid",
        {**MAMBA2, "layer_types": LAYERS, "num_local_experts": 0, "shared_intermediate_size": 20},
    ),
    "nemotron_h": ("NemotronH", NEMOTRON),
    "falcon_h1": ("FalconH1", FALCON_H1),
    "falcon_h1_plain": ("FalconH1", {**MAMBA2, "mamba_d_ssm": 72, "mamba_proj_bias": False}),
    "minimax": ("MiniMax", MINIMAX),
    "kimi_linear": ("KimiLinear", KIMI),
    "bailing_hybrid": ("BailingHybrid", BAILING),
    "bailing_plain": ("BailingHybrid", {**BAILING, "kda_safe_gate": False, "rope_parameters": None}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**DELTA, **EXPERTS, "partial_rotary_factor": 0.4}),
}
# Classes whose configs have no such key.
LACKING = {
    "Zamba2": ("head_dim",),
    "RecurrentGemma": ("head_dim",),
    "Lfm2": ("rms_norm_eps",),
    "Phi3": ("head_dim",),
    "Olmo2": ("head_dim",),
    "Olmo3": ("head_dim",),
    "OlmoHybrid": ("head_dim",),
    "Qwen2": ("head_dim",),
    "KimiLinear": ("head_dim",),
}
# Text models of larger ones have configs of their own name.
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Qwen3_5": "Qwen3_5TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig"}


def make(name: str, *, seed: int = 0, **options) -> torch.nn.Module:
    """The model of a case, with norms, biases and decays that are no identities."""
    import transformers

    family, own = CASES[name]
    fields = {key: value for key, value in COMMON.items() if key not in LACKING.get(family, ())} | own | options
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


# Models that see pictures, whose text model is the case of that name, and what sees in them.
VISION = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
WITH_PICTURES = {
    "gemma3": ("gemma3_text", {**VISION, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}),
    "qwen3_5": ("qwen3_5", {"depth": 1, "hidden_size": 12, "intermediate_size": 20, "num_heads": 2}),
}


def make_with_pictures(name: str) -> torch.nn.Module:
    """A larger model around the text model of a case."""
    import transformers

    text, vision = WITH_PICTURES[name]
    whole = transformers.AutoConfig.for_model(name, text_config=make(text).config.to_dict(), vision_config=vision)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(whole).eval()


def some_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def their_gradients(model: torch.nn.Module, folder) -> dict[str, torch.Tensor]:
    """The gradients of a transformers model by the names that its weights have in a file: saved as if they were."""
    for module in model.modules():
        # RecurrentGemma keeps its last states, which are of no use here, in its modules.
        if hasattr(module, "recurrent_states"):
            module.recurrent_states = None
    holder = copy.deepcopy(model)
    for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad.clone()
    for buffer in holder.buffers():
        buffer.zero_()
    holder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def our_gradients(model) -> dict[str, torch.Tensor]:
    """Those of ours by the same names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # What is carried along has none.
    found = {name: torch.zeros(shape) for name, shape in model.origin.shapes.items()}
    for name, pieces in places_in(model, model.origin).items():
        for piece in pieces:
            gradient = parameters[piece.ours].grad
            if gradient is not None:
                piece.read(gradient, found[name])
    return found
