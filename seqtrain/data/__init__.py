"""Text to token shards to batches."""

from seqtrain.data.batches import Batch, Batches, EvaluationBatches
from seqtrain.data.bigram import bigram_bits_per_byte
from seqtrain.data.config import DataConfig
from seqtrain.data.corpus import Corpus, TokenStream, open_corpus, prepare
from seqtrain.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataConfig",
    "EvaluationBatches",
    "TokenStream",
    "Tokenizer",
    "bigram_bits_per_byte",
    "load_tokenizer",
    "open_corpus",
    "prepare",
]
