"""A `LanguageModel` as a folder that `AutoModelForCausalLM.from_pretrained` loads after `import seqtrain`."""

from collections.abc import Mapping
from typing import Any

import torch

from seqtrain.models.huggingface import SeqtrainForCausalLM
from seqtrain.models.huggingface_config import SeqtrainConfig
from seqtrain.models.language_model import LanguageModel


def as_huggingface(model: LanguageModel, mixers: Mapping[str, Any], **others: Any) -> SeqtrainForCausalLM:
    """`model` as transformers knows it, sharing its weights.

    `mixers`: the `Config` of each of its mixers. `others`: what `SeqtrainConfig` has besides: special tokens, lengths.
    """
    dtype = model.embedding.weight.dtype
    config = SeqtrainConfig.of(model.config, mixers, model.vocab_size, dtype=dtype, **others)
    with torch.device("meta"):
        wrapped = SeqtrainForCausalLM(config)
    wrapped.model = model
    return wrapped
