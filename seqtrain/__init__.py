"""seqtrain: training of language models on very long sequences."""

__version__ = "0.1.0"
