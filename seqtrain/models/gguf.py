"""What a GGUF file (llama.cpp) says of its model, by its own keys alone; what is not understood is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.errors import CheckpointError, ConfigError

DEQUANTIZED_ROWS = 1024
# Keys that stand behind the architecture's name, and what transformers' configs call them.
SIZES: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Values of further keys that change nothing, so that no other may stand there.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# Remarks: how the file was made.
# A module of a Llama-like Hugging Face checkpoint by its name in a GGUF file; `{i}` stands for a layer.
NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
REMARKS = ("rope.scaling.finetuned", "tensor_data_layout")


def open_file(file: Path) -> Any:
    """gguf's reader of `file`. Raises `ConfigError` without gguf, `CheckpointError` for a damaged file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError(f"source={file}: reading GGUF files needs gguf: pip install 'seqtrain[convert]'") from None
    try:
        return GGUFReader(file)
    # What numpy raises for missing bytes.
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: incomplete or corrupt GGUF file ({reason})") from None


def architecture_in(reader: Any) -> str:
    """The architecture's name, by which llama.cpp knows what to do with the rest."""
    found = reader.get_field("general.architecture")
    return str(found.contents()) if found else "missing"


def config_in(reader: Any, file: Path, architecture: str, vocab_size: int) -> dict[str, Any]:
    """The values of transformers' config. Raises `ConfigError` for a key that is missing or not understood."""
    prefix = f"{architecture}."
    keys = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    if missing := [key for key in SIZES if key not in keys]:
        raise ConfigError(f"source={file}: lacks the key {prefix}{missing[0]}")
    keys = {key: value for key, value in keys.items() if key not in REMARKS}
    values = {theirs: keys.pop(key) for key, theirs in SIZES.items()}
    heads = values["num_attention_heads"]
    width = keys.pop("attention.key_length", values["hidden_size"] // max(heads, 1))
    same = {"attention.value_length": width, "rope.dimension_count": width, "vocab_size": vocab_size}
    values |= {
        "num_key_value_heads": keys.pop("attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": vocab_size,
        "rope_parameters": _rotation(keys, values["max_position_embeddings"]),
        **_windows(keys, values["num_hidden_layers"]),
        **_marks(reader),
    }
    for key, value in keys.items():
        allowed = (same[key],) if key in same else NEUTRAL.get(key, ())
        if value not in allowed:
            rule = f"it must be {' or '.join(map(str, allowed))}" if allowed else "the key is not understood"
            raise ConfigError(f"source={file}: {prefix}{key}={value} can't be converted; {rule}")
    return values


def _rotation(keys: dict[str, Any], context: int) -> dict[str, Any]:
    """transformers' `rope_parameters` of what is taken out of `keys`; a kind that is none of theirs stays there."""
    rotation = {"rope_type": "default", "rope_theta": float(keys.pop("rope.freq_base", 10000.0))}
    # llama.cpp's defaults: a factor alone is linear, and no factor, or 0, is none.
    kind = keys.pop("rope.scaling.type", "linear")
    older = keys.pop("rope.scale_linear", 0.0)
    factor = float(keys.pop("rope.scaling.factor", older)) or 1.0
    original = keys.pop("rope.scaling.original_context_length", context)
    betas = {
        name: keys.pop(f"rope.scaling.yarn_{name}", default) for name, default in (("beta_fast", 32), ("beta_slow", 1))
    }
    if kind == "yarn":
        rotation |= {"original_max_position_embeddings": original, **betas}
    if kind in ("linear", "yarn") and factor != 1.0:
        rotation |= {"rope_type": kind, "factor": factor}
    elif kind not in ("linear", "yarn", "none"):
        keys["rope.scaling.type"] = kind
    return rotation


def _windows(keys: dict[str, Any], depth: int) -> dict[str, Any]:
    window = keys.pop("attention.sliding_window", 0) or None
    kind = "sliding_attention" if window else "full_attention"
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": [kind] * depth}


def _marks(reader: Any) -> dict[str, int]:
    fields = {
        f"{mark}_token_id": reader.get_field(f"tokenizer.ggml.{name}_token_id")
        for mark, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {mark: int(field.contents()) for mark, field in fields.items() if field}


def dequantized(tensor: Any) -> Tensor:
    """A reader's tensor in float32, some rows at a time: dequantizing takes several times their size."""
    from gguf import dequantize

    value = torch.empty([int(size) for size in reversed(tensor.shape)])
    for start in range(0, value.shape[0], DEQUANTIZED_ROWS):
        rows = slice(start, start + DEQUANTIZED_ROWS)
        value[rows] = torch.tensor(dequantize(tensor.data[rows], tensor.tensor_type))
    return value


def hf_names(depth: int) -> dict[str, str]:
    """GGUF's names of the tensors of `depth` layers -> those of a Hugging Face checkpoint."""
    return {
        f"{mine}.{kind}".replace("{i}", str(i)): f"{theirs}.{kind}".replace("{i}", str(i))
        for mine, theirs in NAMES.items()
        for i in range(depth if "{i}" in mine else 1)
        for kind in ("weight", "bias")
    }
