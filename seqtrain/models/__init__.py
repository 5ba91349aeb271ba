"""The network and generation from it."""

from seqtrain.models.generation import generate
from seqtrain.models.language_model import LanguageModel, ModelConfig

__all__ = ["LanguageModel", "ModelConfig", "generate"]
