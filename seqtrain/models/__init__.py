"""The network, generation from it, and other people's models as one."""

from typing import Any

from seqtrain.models.config import ModelConfig
from seqtrain.models.generation import generate
from seqtrain.models.language_model import LanguageModel

__all__ = ["LanguageModel", "ModelConfig", "from_pretrained", "generate", "save_pretrained"]


def __getattr__(name: str) -> Any:
    # They read files of Hugging Face's formats, which training a new model does not need.
    if name in ("from_pretrained", "save_pretrained"):
        from seqtrain.models import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
