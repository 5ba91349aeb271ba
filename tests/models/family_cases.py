"""Tiny random models of every family as transformers makes and saves them: odd sizes, every optional part on."""

import copy

import torch
from safetensors.torch import load_file

from seqtrain.models.pretrained import by_tensor, family_of_config, shape_of

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
# By a name of ours: what transformers calls the family's classes, and its config.
CASES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": ("Olmo3", {"sliding_window": 9}),
    # transformers 5.23 saves the convolutions of q, k and v as thirds, whatever their widths: so these are equal.
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "linear_key_head_dim": 20, "attention_bias": True}),
    "qwen3_next": ("Qwen3Next", {**DELTA, **EXPERTS, "partial_rotary_factor": 0.4, "mlp_only_layers": [1]}),
    "qwen3_5": ("Qwen3_5", {**DELTA, "partial_rotary_factor": 0.4}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**DELTA, **EXPERTS, "partial_rotary_factor": 0.4}),
}
# Classes whose configs have no such key.
LACKING = {"Olmo2": ("head_dim",), "Olmo3": ("head_dim",), "OlmoHybrid": ("head_dim",), "Qwen2": ("head_dim",)}
# Text models of larger ones have configs of their own name.
CONFIGS = {"Qwen3_5": "Qwen3_5TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig"}


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
    return model


def some_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def their_gradients(model: torch.nn.Module, folder) -> dict[str, torch.Tensor]:
    """The gradients of a transformers model by the names that its weights have in a file: saved as if they were."""
    holder = copy.deepcopy(model)
    for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad.clone()
    holder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def our_gradients(model) -> dict[str, torch.Tensor]:
    """Those of ours by the same names."""
    family, config = family_of_config(model.origin.config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places, found = by_tensor(family.pieces(config, model)), {}
    for name in model.origin.dtypes:
        pieces = places[family.canonical(name)]
        found[name] = torch.zeros(shape_of(pieces, parameters))
        for piece in pieces:
            gradient = parameters[piece.ours].grad
            if gradient is not None:
                piece.read(gradient, found[name])
    return found
