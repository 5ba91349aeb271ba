"""A corpus of fifteen trillion tokens, of whose 447,000 shards those exist that are read."""

import os
import subprocess
import sys

import numpy as np
import pytest

from seqtrain.data.bigram import SHAPE
from seqtrain.data.manifest import (
    BIGRAMS,
    INDEX,
    MANIFEST,
    VERSION,
    CorpusManifest,
    ShardIndex,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    write_index,
)
from seqtrain.data.packing import ShuffledWindows
from seqtrain.data.shards import HEADER, MAGIC, SHARD_VERSION
from seqtrain.data.stream import TokenStream
from seqtrain.data.tokenizer import ByteTokenizer
from seqtrain.files import sha256_of

SHARDS, TOKENS, STARTS, LENGTH, ROWS = 447_000, 2**25, 2**10, 4096, 8


def made_up(folder):
    """Writes all of the corpus but its shards; returns the entry of its training split."""
    rows = np.zeros(SHARDS, INDEX)
    rows["file"] = [b"train-%06d-00000.bin" % number for number in range(SHARDS)]
    rows["sha256"] = b"0" * 64
    each = np.ones(SHARDS, np.int64)
    sums = {"train": write_index(folder, "train", each * TOKENS, each * STARTS, rows)}
    sums["held_out"] = write_index(folder, "held_out", each[:0], each[:0], rows[:0])
    np.save(folder / BIGRAMS, np.zeros((2, *SHAPE), np.int64))
    text = SHARDS * (TOKENS - STARTS)
    train = SplitEntry(SHARDS * STARTS, SHARDS * TOKENS, text, text, SHARDS * STARTS, "0", sums["train"])
    held_out = SplitEntry(index_sha256=sums["held_out"])
    tokenizer = TokenizerEntry("bytes", "bytes-257", 257, 256)
    manifest = CorpusManifest(
        VERSION, "0", SourceEntry("text", 1), tokenizer, 0, train, held_out, sha256_of(folder / BIGRAMS)
    )
    manifest.write(folder / MANIFEST)
    return train


def write_shard(folder, shards, number, start, stop):
    """A shard with holes but for `position % 251` at the positions from `start` to `stop`, counted in the split."""
    first, starts = shards.first(number), np.arange(STARTS, dtype="<i8") * (TOKENS // STARTS)
    low, high = max(start, first), min(stop, first + TOKENS)
    with (folder / shards.entry(number).file).open("wb") as file:
        file.write(HEADER.pack(MAGIC, SHARD_VERSION, 2, TOKENS, STARTS, 257, 0))
        file.seek(HEADER.size + 2 * (low - first))
        file.write((np.arange(low, high) % 251).astype("<u2").tobytes())
        file.seek(HEADER.size + 2 * TOKENS)
        file.write(starts.tobytes())


# In a process of its own: an audit hook stays, and so does memory.
READ = """
import os, sys, time
import numpy as np
from seqtrain.data import BatchSlice, DataConfig, open_corpus

folder, length, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
calls = []

def note(name, path):
    # Modules that are imported meanwhile are not the corpus.
    if isinstance(path, int) or str(path).startswith(folder):
        calls.append(name)

def counted(name, function):
    def call(path, *arguments, **options):
        note(name, path)
        return function(path, *arguments, **options)
    return call

def audit(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        note(event, arguments[0])

sys.addaudithook(audit)
for name in ("stat", "lstat", "fstat", "access"):
    setattr(os, name, counted(name, getattr(os, name)))

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

open("/proc/self/clear_refs", "w").write("5")
before, began = memory("VmRSS"), time.perf_counter()
calls.clear()
corpus = open_corpus(folder, DataConfig(source="text"))
batches = corpus.training_batches(seed=0, sequence_length=length, batch_size=rows)
batches.at(0, BatchSlice(rank=0, ranks=rows))
told, seconds = list(calls), time.perf_counter() - began
batch = batches.at(0)
starts = [batches.row(number).spans[0].start for number in range(rows)]
expected = np.concatenate([np.arange(start, start + length) % 251 for start in starts])
assert (batch.tokens[0].numpy() == expected).all()
print(len(told), max(starts), memory("VmHWM") - before, f"{seconds:.2f} s", told)
"""


@pytest.mark.all
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to reset the peak")
def test_a_corpus_of_447_000_shards_is_opened_by_a_few_calls(tmp_path):
    entry = made_up(tmp_path)
    shards = ShardIndex.open(tmp_path, "train", entry, 257)
    packing = ShuffledWindows(TokenStream("train", entry, shards, ByteTokenizer()), length=LENGTH, seed=0)
    for row in range(ROWS):
        (span,) = packing.spans(*packing.locate(row))
        for number in range(shards.find(span.start), shards.find(span.stop) + 1):
            write_shard(tmp_path, shards, number, span.start, span.stop + 1)
    command = [sys.executable, "-c", READ, str(tmp_path), str(LENGTH), str(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    calls, farthest, grown_kib = map(int, done.stdout.split()[:3])
    # Four for the manifest, two for the indexes, two for the shard.
    assert calls <= 20
    assert farthest > 2**43
    assert grown_kib / 1024 < 200


def test_positions_of_the_made_up_corpus_are_those_of_its_index():
    rows = np.zeros(3, INDEX)
    rows["end"], rows["starts_end"] = [2**42, 2**43, 2**44], [5, 5, 9]
    shards = ShardIndex(None, "train", rows, 257)
    assert [shards.find(position) for position in (0, 2**42 - 1, 2**42, 2**43 + 7)] == [0, 0, 1, 2]
    assert [shards.first(number) for number in range(4)] == [0, 2**42, 2**43, 2**44]
    # The second has no start of its own.
    assert [shards.find_document(document) for document in (0, 4, 5, 8)] == [0, 0, 2, 2]
    assert shards.entry(2).tokens == 2**43
    assert shards.entry(1).starts == 0
