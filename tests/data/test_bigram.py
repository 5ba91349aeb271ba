import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from seqtrain.data import DataConfig, EvaluationBatches, bigram_bits_per_byte, prepare
from seqtrain.data.bigram import count_pairs, read_counts
from seqtrain.data.packing import Windows


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "train.txt").write_text("abab")
    (tmp_path / "eval.txt").write_text("aba")
    files = {"path": str(tmp_path / "train.txt"), "held_out_path": str(tmp_path / "eval.txt")}
    return DataConfig(source="text", cache_dir=str(tmp_path / "cache"), **files)


def test_against_a_value_worked_out_by_hand(tiny):
    # Training pairs: ab 2, ba 1, b-end 1. Held out: ab, ba, a-end; two bytes are predicted, the first is given.
    corpus, s = prepare(tiny, progress=False), 0.1
    probabilities = [(count + s) / (2 + 257 * s) for count in (2, 1, 0)]
    assert bigram_bits_per_byte(corpus) == pytest.approx(-sum(map(math.log2, probabilities)) / 2, rel=1e-12)
    assert bigram_bits_per_byte(corpus, smoothing=1e9) == pytest.approx(3 * math.log2(257) / 2, rel=1e-6)


def test_nothing_held_out_is_no_batch_and_not_a_number(tiny):
    corpus = prepare(replace(tiny, held_out_path="", held_out=0.0), progress=False)
    assert math.isnan(bigram_bits_per_byte(corpus))
    assert len(EvaluationBatches(Windows(corpus.held_out, length=20), batch_size=4)) == 0


def test_pairs_are_counted_across_pieces_but_not_across_documents():
    whole = count_pairs([(b"hello world", -1, True), (b"again", -1, True)])
    parts = count_pairs([(b"hello", -1, False)])
    parts += count_pairs([(b" wor", ord("o"), False), (b"ld", ord("r"), True), (b"a", -1, False)])
    parts += count_pairs([(b"gain", ord("a"), True)])
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum() == len("hello world") + len("again")
    assert whole[ord("d"), ord("a")] == 0
    assert whole[ord("d"), 256] == whole[ord("n"), 256] == 1


def test_counts_are_those_of_the_text_whatever_the_tokenizer(config, corpus, bpe_folder):
    by_hand = np.zeros((256, 257), dtype=np.int64)
    ids = corpus.held_out.read(0, corpus.held_out.tokens)
    for before, after in itertools.pairwise(ids):
        if before != 256:
            by_hand[before, after] += 1
    np.testing.assert_array_equal(read_counts(corpus.bigrams)[1], by_hand)
    other = prepare(replace(config, tokenizer=str(bpe_folder)), progress=False)
    np.testing.assert_array_equal(read_counts(other.bigrams), read_counts(corpus.bigrams))
    assert bigram_bits_per_byte(other) == bigram_bits_per_byte(corpus)
    assert 1 < bigram_bits_per_byte(corpus) < 5
