import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seqtrain.data import DataConfig, open_corpus, prepare
from seqtrain.data import corpus as corpus_module
from seqtrain.errors import DataError
from tests.command_cases import refused


def test_streams_read_across_shards_and_know_where_documents_start(corpus, text_folder):
    stream = corpus.train
    assert len(corpus.train.shards) > 3
    whole = stream.read(0, stream.tokens)
    starts = stream.starts(0, stream.tokens)
    ends = np.flatnonzero(whole == corpus.tokenizer.end) + 1
    np.testing.assert_array_equal(starts, np.concatenate([[0], ends[:-1]]))
    assert ends[-1] == stream.tokens
    assert len(starts) == stream.documents
    for start in range(0, stream.tokens, 501):
        stop = min(start + 1700, stream.tokens)
        np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])
        inside = starts[(starts >= start) & (starts < stop)]
        np.testing.assert_array_equal(stream.starts(start, stop), inside)
    assert stream.read(5, 5).shape == stream.starts(5, 5).shape == (0,)


def test_manifest_says_what_is_there(corpus):
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["source"] == {"name": "text", "files": 20}
    assert manifest["tokenizer"] == {"name": "bytes", "identity": "bytes-257", "vocab_size": 257, "end": 256}
    assert manifest["empty_documents"] == 1
    assert manifest["train"]["documents"] + manifest["held_out"]["documents"] == 19
    for name, stream in (("train", corpus.train), ("held_out", corpus.held_out)):
        split = manifest[name]
        assert split["tokens"] == stream.tokens == stream.bytes + stream.documents
        assert split["bytes"] == split["token_bytes"] == stream.bytes
        assert stream.predicted_bytes == stream.bytes - stream.documents


def test_workers_open_the_folder_without_the_text(corpus, config, text_folder):
    for file in text_folder.rglob("*.txt"):
        file.unlink()
    opened = open_corpus(corpus.folder, config)
    np.testing.assert_array_equal(opened.held_out.read(0, 50), corpus.held_out.read(0, 50))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_checksums_are_compared_once(corpus, config, monkeypatch):
    file = corpus.folder / "train-00001.bin"
    stamp = file.stat()
    flip(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    # Same size, same time: only a look at every byte can tell.
    open_corpus(corpus.folder, config)
    with pytest.raises(DataError, match="checksum"):
        open_corpus(corpus.folder, replace(config, verify="always"))
    os.utime(file)
    open_corpus(corpus.folder, replace(config, verify="never"))
    with pytest.raises(DataError, match="checksum"):
        open_corpus(corpus.folder, config)


@pytest.mark.parametrize(
    ("damage", "name", "verify", "message"),
    [
        (flip, "train-00001.bin", "first", r"train-00001\.bin: checksum is .*; delete .* to rebuild the corpus"),
        (flip, "bigrams.npy", "first", r"bigrams\.npy: missing, or not what manifest.json says"),
        (lambda file: os.truncate(file, 100), "held_out-00000.bin", "never", r"held_out-00000\.bin: truncated"),
        (Path.unlink, "held_out-00000.bin", "never", r"held_out-00000\.bin: can't be read"),
        (Path.unlink, "manifest.json", "never", r"manifest\.json: missing; delete the folder to rebuild the corpus"),
    ],
)
def test_damage_is_found_when_the_corpus_is_opened_or_first_read(corpus, config, damage, name, verify, message):
    damage(corpus.folder / name)
    with pytest.raises(DataError, match=message):
        open_corpus(corpus.folder, replace(config, verify=verify)).held_out.read(0, 1)


SHARD = {"file": "train-00000.bin", "tokens": 1, "starts": 1, "sha256": ""}


@pytest.mark.parametrize(
    ("train", "fields", "message"),
    [
        ({"shards": [SHARD | {"file": "../train-00000.bin"}]}, {}, "shards must be plain files of that folder"),
        ({"shards": [SHARD | {"file": "/etc/passwd"}]}, {}, "shards must be plain files of that folder"),
        ({"shards": []}, {}, r"manifest\.json: train has \d+ tokens in \d+ documents, its shards"),
        ({"tokens": "many"}, {}, r"manifest\.json: damaged at train\.tokens"),
        ({}, {"version": 3}, r"manifest\.json: version 3, this seqtrain reads \(1, 2\)"),
    ],
)
def test_manifests_that_lie(corpus, config, train, fields, message):
    file = corpus.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    train = {"index_sha256": "", **train} if "shards" in train else train
    file.write_text(json.dumps(manifest | fields | {"train": manifest["train"] | train}))
    with pytest.raises(DataError, match=message):
        open_corpus(corpus.folder, config)


def test_another_tokenizer_is_refused(corpus, config, bpe_folder):
    with pytest.raises(DataError, match=r"made with another tokenizer \(bytes, 257 ids\) than data\.tokenizer=.*bpe"):
        open_corpus(corpus.folder, replace(config, tokenizer=str(bpe_folder)))


def test_a_folder_that_cannot_be_written_is_opened_all_the_same(corpus, config, monkeypatch):
    (corpus.folder / "train.verified").unlink()
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    open_corpus(corpus.folder, config)
    assert not (corpus.folder / "train.verified").exists()


def test_a_hugging_face_corpus_holds_the_same_text(config, bpe_folder, small_steps):
    config = replace(config, tokenizer=str(bpe_folder), shard_tokens=1000)
    corpus = prepare(config, progress=False)
    plain = prepare(replace(config, tokenizer="bytes"), progress=False)
    assert len(corpus.train.shards) > 2
    for name in ("train", "held_out"):
        stream, expected = (getattr(c, name) for c in (corpus, plain))
        assert stream.documents == expected.documents
        assert stream.bytes == expected.bytes
        assert stream.byte_scale == 1
        ids, bytes_of_it = stream.read(0, stream.tokens), expected.read(0, expected.tokens)
        assert corpus.tokenizer.decode(ids) == plain.tokenizer.decode(bytes_of_it)
        assert stream.tokens < 0.7 * expected.tokens
        first = ids[stream.starts(0, stream.tokens)]
        assert stream.predicted_bytes == stream.bytes - corpus.tokenizer.byte_count(first)


def test_more_shards_than_open_files(corpus, config, monkeypatch):
    monkeypatch.setattr("seqtrain.data.stream.OPEN_SHARDS", 2)
    few = open_corpus(corpus.folder, config).train
    for start in (0, few.tokens // 2, 0, few.tokens - 100):
        np.testing.assert_array_equal(few.read(start, start + 100), corpus.train.read(start, start + 100))
    assert few._opened.cache_info().currsize == 2


def test_the_cache_folder_of_the_user_is_the_default(monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: f"/caches/{name}")
    assert str(corpus_module.cache_folder(DataConfig())) == "/caches/seqtrain"
    assert str(corpus_module.cache_folder(DataConfig(cache_dir="/x"))) == "/x"


def test_all_that_is_wrong_with_text_and_tokenizer_comes_at_once(tmp_path, bpe_folder):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"body": "text {n}"}}\n' for n in range(30)))
    config = DataConfig(source="jsonl", path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    nowhere = replace(config, tokenizer=str(tmp_path / "nowhere"))
    with refused("no field 'text', the line holds fields ['body']; set data.text_field; data.tokenizer: "):
        prepare(nowhere, progress=False)
    with refused("data.held_out=0.0001: no document of the 30 in", DataError):
        prepare(replace(config, text_field="body", held_out=0.0001), progress=False)
    assert not (tmp_path / "cache").exists()
