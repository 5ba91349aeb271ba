"""The transformers model of a folder, or a small one of its config."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqtrain.errors import ConfigError

# A small model has at most so many experts, tokens in its vocabulary and, where its widths can be divided, parameters.
EXPERTS, VOCABULARY, PARAMETERS = 8, 1024, 2e7
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN, GROUPS = ("num_experts_per_tok", "num_experts_per_token"), ("n_group", "num_expert_group", "topk_group")
# Widths and counts of heads and groups, which divided alike still fit each other.
WIDTHS = re.compile(
    r"(hidden_size|embedding_dim|intermediate_size|latent_size|_heads|n_groups|_ngroups|lru_width|_d_ssm|dt_rank|step_rank)$"
)


def open_folder(path: str, most_parameters: float) -> tuple[Any, str]:
    """The transformers model of a folder or config.json in float32, and a line on what was made of it.

    Without weights, or with more than `most_parameters`, it is a small random one of that config. Raises `ConfigError`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = Path(path).expanduser()
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise ConfigError(f"model={path}: no folder with a config.json, and no such file")
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True).get_text_config()
        size = _size(config)
    except Exception as error:
        raise ConfigError(f"model={path}: {' '.join(str(error).split())[:300]}") from error
    weights = place.is_dir() and [*place.glob("*.safetensors"), *place.glob("*.bin")]
    if weights and size <= most_parameters:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, local_files_only=True)
        return model.eval(), f"{type(model).__name__}, {size:,} parameters, with the folder's weights"
    small, model = _small(config, path)
    _stir(model)
    count = sum(each.numel() for each in model.parameters())
    why = f"{size:,} are too many here" if weights else "no weights"
    return model, f"{type(model).__name__}, {count:,} random parameters ({why}; {_changes(config, small)})"


def _size(config: Any) -> int:
    """Parameters, of which none is made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())


def _stir(model: nn.Module) -> None:
    """Moves weights off their initial constants, where zeros and ones hide what they multiply."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)


def _small(config: Any, path: str) -> tuple[Any, Any]:
    """A shorter config, as wide as may be, and its model."""
    from transformers import AutoModelForCausalLM

    values = _shortened(config.to_dict())
    for divisor in (1, 2, 4, 8, 16, 32, 64):
        # Widths that can't be divided by so much end in anything.
        with suppress(Exception):
            small = type(config).from_dict(_divided(values, divisor))
            if _size(small) <= PARAMETERS:
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
                with torch.no_grad():
                    model(torch.zeros(1, 5, dtype=torch.int64), use_cache=False)
                return small, model
    raise ConfigError(f"model={path}: no small model follows from its config; give one with smaller widths")


def _divided(values: dict[str, Any], divisor: int) -> dict[str, Any]:
    """Widths and counts of heads divided; every head as wide as it was."""
    widths = {key: each for key, each in values.items() if WIDTHS.search(key) and isinstance(each, int)}
    return values | {key: max(1, each // divisor) for key, each in widths.items() if not isinstance(each, bool)}


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """The config with the first layers that show every kind, fewer experts and tokens."""
    found = dict(values)
    depth = values.get("num_hidden_layers") or 0
    lists = [key for key, each in values.items() if isinstance(each, list) and len(each) == depth and depth]
    kinds = [tuple(str(values[key][index]) for key in lists) for index in range(depth)]
    least = max((kinds.index(kind) + 1 for kind in set(kinds)), default=depth) if lists else min(depth, 4)
    found["num_hidden_layers"] = least = min(depth, max(least, 2))
    found |= {key: values[key][:least] for key in lists}
    found["vocab_size"] = min(values["vocab_size"], VOCABULARY)
    found |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    for key in EXPERT_KEYS:
        if isinstance(values.get(key), int) and values[key] > EXPERTS:
            found[key] = max([EXPERTS, *(values.get(each) or 0 for each in CHOSEN)])
            # Too few to choose groups of them first.
            found |= {group: 1 for group in GROUPS if group in values}
    return json.loads(json.dumps(found))


def _changes(config: Any, small: Any) -> str:
    before, after = config.to_dict(), small.to_dict()
    keys = ("num_hidden_layers", "hidden_size", "vocab_size", *EXPERT_KEYS)
    told = [f"{key} {before[key]} -> {after[key]}" for key in keys if key in before and before[key] != after.get(key)]
    return ", ".join(told) or "as the config says"
