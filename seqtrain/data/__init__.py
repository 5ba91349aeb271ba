"""Text to token shards to batches, or a synthetic task in their place."""

from seqtrain.data.batches import WHOLE_BATCH, Batch, Batches, EvaluationBatches, Share
from seqtrain.data.bigram import bigram_bits_per_byte
from seqtrain.data.config import DataConfig
from seqtrain.data.corpus import Corpus, TokenStream
from seqtrain.data.opening import (
    check_source,
    held_out_batches,
    load_tokenizer,
    open_corpus,
    prepare,
    training_batches,
)
from seqtrain.data.synthetic import SyntheticBatches, SyntheticCorpus
from seqtrain.data.tokenizer import Tokenizer

__all__ = [
    "WHOLE_BATCH",
    "Batch",
    "Batches",
    "Corpus",
    "DataConfig",
    "EvaluationBatches",
    "Share",
    "SyntheticBatches",
    "SyntheticCorpus",
    "TokenStream",
    "Tokenizer",
    "bigram_bits_per_byte",
    "check_source",
    "held_out_batches",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "training_batches",
]
