"""The config of an exported model: what `LanguageModel` is built from, as Hugging Face stores it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from seqtrain.errors import CheckpointError
from seqtrain.models.config import ModelConfig, mixer_class
from seqtrain.models.language_model import LanguageModel
from seqtrain.validation import validate


class SeqtrainConfig(PreTrainedConfig):
    """`model`: a `ModelConfig` as a dict; `mixers`: the `Config` of each mixer in it; `architecture_sha256`: of both.

    `max_position_embeddings`: the longest text the model was made for; nothing stops a longer one.
    """

    model_type = "seqtrain"
    keys_to_ignore_at_inference = ("past_key_values",)

    model: dict[str, Any] | None = None
    mixers: dict[str, Any] | None = None
    vocab_size: int = 0
    max_position_embeddings: int = 2**31 - 1
    architecture_sha256: str = ""
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @staticmethod
    def of(model: ModelConfig, mixers: Mapping[str, Any], vocab_size: int, **others: Any) -> "SeqtrainConfig":
        """The config of a model; `others`: special tokens and the rest of what Hugging Face knows of any model."""
        used = {name: asdict(mixers[name]) for name in sorted(set(model.mixers) & set(mixers))}
        config = SeqtrainConfig(
            model=json.loads(json.dumps(asdict(model))),
            mixers=json.loads(json.dumps(used)),
            vocab_size=vocab_size,
            # To transformers this says whether anything is tied.
            tie_word_embeddings=model.tie_embeddings or any(model.shared.layers),
            **others,
        )
        config.architecture_sha256 = config.fingerprint()
        return config

    def fingerprint(self) -> str:
        """Of what decides how the weights are used."""
        parts = json.dumps([self.model, self.mixers, self.vocab_size], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    def check(self) -> None:
        """Raises `CheckpointError` where the architecture is not the one this config was made with."""
        if self.fingerprint() != self.architecture_sha256:
            raise CheckpointError(
                f"{self.name_or_path or 'config'}: model or mixers were changed after export, and the weights belong "
                "to what was there before; restore it, or convert again"
            )

    def build(self) -> LanguageModel:
        """The network, with new weights. Raises `ConfigError`."""
        mixers: dict[str, Any] = {
            name: validate(mixer_class(name).Config, values, prefix=f"mixers.{name}.")
            for name, values in (self.mixers or {}).items()
        }
        return LanguageModel(validate(ModelConfig, self.model or {}, prefix="model."), mixers, self.vocab_size)

    @property
    def hidden_size(self) -> int:
        return (self.model or {}).get("width", 0)

    @property
    def num_hidden_layers(self) -> int:
        return (self.model or {}).get("depth", 0)

    @property
    def num_attention_heads(self) -> int:
        return (self.model or {}).get("heads", 0)
