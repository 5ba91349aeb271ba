"""Text to token shards to batches, or a synthetic task in their place."""

from seqtrain.data.batches import WHOLE_BATCH, Batch, Batches, BatchSlice, EvaluationBatches
from seqtrain.data.bigram import bigram_bits_per_byte
from seqtrain.data.config import DataConfig
from seqtrain.data.corpus import Corpus
from seqtrain.data.entries import without_places
from seqtrain.data.manifest import ShardIndex
from seqtrain.data.mixture import HeldOutParts, Mixture, check_source, open_corpus, prepare
from seqtrain.data.packing import Packing
from seqtrain.data.stream import TokenStream
from seqtrain.data.synthetic import SyntheticBatches, SyntheticCorpus
from seqtrain.data.tokenizer import Tokenizer, load_tokenizer
from seqtrain.data.verification import Verification

__all__ = [
    "WHOLE_BATCH",
    "Batch",
    "BatchSlice",
    "Batches",
    "Corpus",
    "DataConfig",
    "EvaluationBatches",
    "HeldOutParts",
    "Mixture",
    "Packing",
    "ShardIndex",
    "SyntheticBatches",
    "SyntheticCorpus",
    "TokenStream",
    "Tokenizer",
    "Verification",
    "bigram_bits_per_byte",
    "check_source",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "without_places",
]
