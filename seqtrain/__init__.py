"""seqtrain: training of language models on very long sequences."""

from seqtrain.hub import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
