"""Token files of other makers, read in place."""

import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from seqtrain.data import DataConfig, bigram_bits_per_byte, open_corpus, prepare
from seqtrain.errors import DataError
from tests.command_cases import refused

CODES = {"<u1": 1, "<i4": 4, "<i8": 5, "<u2": 8}


def documents(count=40, seed=0):
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(97, 123, draw.integers(3, 60)), 256) for _ in range(count)]


def write_megatron(prefix, texts, dtype="<u2", empty=False):
    """As Megatron-LM's IndexedDatasetBuilder does; every third document is of two sequences."""
    sequences, first = [], [0]
    for number, text in enumerate(texts):
        sequences += [text[:2], text[2:]] if number % 3 == 0 else [text]
        first.append(len(sequences))
        # A document without a sequence.
        first += [first[-1]] * empty
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(first))
    prefix.parent.mkdir(exist_ok=True)
    arrays = (lengths, offsets, np.array(first, "<i8"))
    prefix.with_suffix(".idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))
    prefix.with_suffix(".bin").write_bytes(np.concatenate(texts).astype(dtype).tobytes())


def write_datatrove(file, texts, dtype="<u2", loss=None):
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(np.concatenate(texts).astype(dtype).tobytes())
    file.with_name(f"{file.name}.index").write_bytes(np.cumsum(list(map(len, texts))).astype("<u8").tobytes())
    if loss is not None:
        file.with_name(f"{file.name}.loss").write_bytes(loss.astype("u1").tobytes())


def config_of(kind, path, tmp_path, **fields):
    return DataConfig(source=kind, path=str(path), cache_dir=str(tmp_path / "cache"), **fields)


def texts_of(stream):
    borders = [*stream.starts(0, stream.tokens).tolist(), stream.tokens]
    assert len(borders) == stream.documents + 1
    assert stream.document_starts(0, stream.documents).tolist() == borders[:-1]
    return [stream.read(*pair).tolist() for pair in pairwise(borders)]


@pytest.mark.parametrize(
    ("kind", "dtype", "empty"),
    [("megatron", "<u2", False), ("megatron", "<i4", True), ("datatrove", "<u2", False), ("datatrove", "<u4", False)],
)
def test_tokens_and_documents_are_those_of_the_files(tmp_path, kind, dtype, empty):
    texts = documents()
    folder = tmp_path / "tokens"
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        if kind == "megatron":
            write_megatron(folder / name, part, dtype, empty)
        else:
            write_datatrove(folder / f"{name}.ds", part, dtype)
    config = config_of(kind, folder, tmp_path, held_out=0.3)
    corpus = open_corpus(prepare(config, progress=False).folder, config)
    assert texts_of(corpus.train) + texts_of(corpus.held_out) == [text.tolist() for text in texts]
    # Whole documents at the end, as many as fit into the share.
    share = corpus.held_out.tokens / sum(map(len, texts))
    assert 0.3 - 62 / sum(map(len, texts)) < share <= 0.3
    batch = corpus.training_batches(seed=0, sequence_length=32, batch_size=4).at(1)
    assert batch.tokens.max() <= 256
    assert corpus.bytes_per_token == pytest.approx(1 - 1 / np.mean(list(map(len, texts))), rel=0.05)
    assert np.isnan(bigram_bits_per_byte(corpus))
    copy = (tmp_path / "tokens").rename(tmp_path / "moved")
    assert prepare(replace(config, path=str(copy)), progress=False).content == corpus.content


def test_prefixes_held_out_files_and_what_is_not_predicted(tmp_path):
    texts = documents(20)
    write_megatron(tmp_path / "m" / "one_document", texts[:10])
    write_megatron(tmp_path / "m" / "two_document", texts[10:])
    for path in ("m/one_document", "m/one_document.bin", "m/one_docu*"):
        corpus = prepare(config_of("megatron", tmp_path / path, tmp_path, held_out=0), progress=False)
        assert texts_of(corpus.train) == [text.tolist() for text in texts[:10]]
    own = {"path": str(tmp_path / "m/one_document"), "held_out_path": str(tmp_path / "m/two_document")}
    corpus = prepare(replace(config_of("megatron", "", tmp_path), **own), progress=False)
    assert texts_of(corpus.held_out) == [text.tolist() for text in texts[10:]]
    loss = np.random.default_rng(1).integers(2, size=sum(map(len, texts)))
    write_datatrove(tmp_path / "d.ds", texts, loss=loss)
    stream = prepare(config_of("datatrove", tmp_path / "d.ds", tmp_path, held_out=0), progress=False).train
    assert stream.counted(7, 90).tolist() == (loss[7:90] == 1).tolist()


def test_what_is_wrong_with_token_files_is_one_line(tmp_path, bpe_folder):
    texts = documents(20)
    write_megatron(tmp_path / "m", texts)
    write_datatrove(tmp_path / "d.ds", texts)

    def told(message, kind, name, error=DataError, **fields):
        with refused(message, error):
            prepare(config_of(kind, tmp_path / name, tmp_path, **fields), progress=False)

    told("data.path: ", "megatron", "none")
    told("no document at the end of", "datatrove", "d.ds", held_out=1e-6)
    write_megatron(tmp_path / "large", [np.array([5, 300, 256])])
    told("large.idx: id 300 at token 1, but data.tokenizer has 257", "megatron", "large", held_out=0)
    content = (tmp_path / "m.idx").read_bytes()
    for damaged, message in (
        (b"no" + content, "m.idx: not an index of Megatron's"),
        (content[:17] + b"\x07" + content[18:], "m.idx: version 1 with ids of type 7; known are 1 with"),
        (content[:-9], "m.idx: cut off"),
    ):
        (tmp_path / "m.idx").write_bytes(damaged)
        told(message, "megatron", "m")
    (tmp_path / "m.idx").write_bytes(content)
    (tmp_path / "m.bin").write_bytes(b"1")
    told("m.bin must have", "megatron", "m")
    (tmp_path / "d.ds.loss").write_bytes(b"1")
    told("d.ds.loss must have a byte for each of", "datatrove", "d.ds")
    (tmp_path / "d.ds.index").unlink()
    told("d.ds: d.ds.index beside it must hold", "datatrove", "d.ds")


def test_files_that_changed_since_are_refused(tmp_path):
    write_megatron(tmp_path / "m", documents(20))
    config = config_of("megatron", tmp_path / "m", tmp_path, held_out=0)
    folder = prepare(config, progress=False).folder
    write_megatron(tmp_path / "m", documents(20, seed=5))
    with refused("m.idx: isn't what it was when the run was prepared", DataError):
        open_corpus(folder, config).train.read(0, 5)
