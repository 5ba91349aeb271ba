"""Text divided into sections: the same tokens as in one piece, and the same files whoever makes them."""

import json
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from seqtrain.data import DataConfig, ingest, prepare, sections
from seqtrain.data.progress import ProgressLog
from seqtrain.data.sources import SOURCES
from seqtrain.data.sources._base import Place
from seqtrain.data.tokenizer import load_tokenizer
from seqtrain.errors import DataError
from seqtrain.files import sha256_of
from tests.data.conftest import sentence
from tests.data.test_ingest import content, forked, prepare_and_die

ROWS = [sentence(seed, seed * 37 % 90) for seed in range(120)]


@pytest.fixture
def small_sections(monkeypatch, small_steps):
    """Sections of about 3,000 bytes, in this process."""
    monkeypatch.setattr(sections, "SECTION_BYTES", 3000)


def written(kind, folder):
    """The rows in the form of `kind`: several files, or one. Returns what to put in data.path."""
    folder.mkdir()
    if kind == "files":
        for number, text in enumerate(ROWS):
            (folder / f"{number:03d}.txt").write_text(text)
    elif kind == "file":
        (folder / "all.txt").write_text("\n".join(ROWS))
    elif kind == "jsonl":
        lines = [json.dumps({"text": text}) + "\n" * (1 + number % 3) for number, text in enumerate(ROWS)]
        for name, part in (("a", lines[:90]), ("b", lines[90:])):
            (folder / f"{name}.jsonl").write_text("".join(part))
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ROWS}), folder / "a.parquet", row_group_size=7, compression="none")
    else:
        import datasets

        datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(folder / "set")
        return str(folder / "set")
    return str(folder)


def described(kind, path, tmp_path, **fields):
    source = "text" if kind in ("files", "file") else kind
    fields = {"held_out": 0.2, "shard_tokens": 1200, "cache_dir": str(tmp_path / "cache"), "workers": 1} | fields
    return DataConfig(source=source, path=path, **fields)


@pytest.mark.parametrize("kind", ["files", "file", "jsonl", "parquet", "huggingface"])
def test_sections_have_the_tokens_of_the_text_in_one_piece(kind, small_sections, bpe_folder, tmp_path, monkeypatch):
    config = described(kind, written(kind, tmp_path / "text"), tmp_path, tokenizer=str(bpe_folder))
    divided = prepare(config, progress=False)
    assert len({name.split("-")[1] for name in shard_names(divided.train)}) > 3
    monkeypatch.setattr(sections, "SECTION_BYTES", 2**23)
    whole = prepare(replace(config, cache_dir=str(tmp_path / "whole")), progress=False)
    assert divided.folder.name != whole.folder.name
    for split in ("train", "held_out"):
        a, b = getattr(divided, split), getattr(whole, split)
        np.testing.assert_array_equal(a.read(0, a.tokens), b.read(0, b.tokens))
        np.testing.assert_array_equal(a.starts(0, a.tokens), b.starts(0, b.tokens))
        assert (a.bytes, a.byte_scale, a.predicted_bytes) == (b.bytes, b.byte_scale, b.predicted_bytes)
    assert divided.bigrams.read_bytes() == whole.bigrams.read_bytes()
    assert divided.manifest.empty_documents == whole.manifest.empty_documents


def shard_names(stream):
    return [stream.shards.entry(number).file for number in range(len(stream.shards))]


def test_a_corpus_of_one_piece_is_taken_where_there_is_one(small_sections, tmp_path, monkeypatch):
    config = described("jsonl", written("jsonl", tmp_path / "text"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sections, "SECTION_BYTES", 2**23)
        before = prepare(config, progress=False)
    assert prepare(config, progress=False).folder == before.folder


def test_how_many_sections_a_text_has():
    for total, shard_tokens, least, most in (
        (2**23, 2**25, 1, 1),
        (2**24 - 1, 2**25, 1, 1),
        (200 * 10**6, 2**25, 20, 24),
        (2**33, 2**25, 64, 128),
        (60 * 10**12, 2**25, 4 * 10**5, 5 * 10**5),
        (60 * 10**12, 2**31, 6000, 8000),
    ):
        size = sections.section_bytes(total, shard_tokens)
        assert least <= (-(-total // size) if size else 1) <= most, total


@pytest.mark.all
def test_processes_make_the_same_files(tmp_path, monkeypatch):
    # Of other constants that are set here, processes beside this one know nothing.
    monkeypatch.setattr(sections, "SECTION_BYTES", 3000)
    config = described("jsonl", written("jsonl", tmp_path / "text"), tmp_path)
    prepare(config, progress=False)
    prepare(replace(config, workers=2, cache_dir=str(tmp_path / "beside")), progress=False)
    assert content(tmp_path / "beside") == content(tmp_path / "cache")
    assert len(content(tmp_path / "cache")) > 10


@pytest.mark.all
def test_an_error_in_another_process_is_the_same_line(small_sections, tmp_path):
    path = written("files", tmp_path / "text")
    (tmp_path / "text" / "119.txt").write_bytes(b"\xff" * 9)
    with pytest.raises(DataError, match=r"119\.txt: not UTF-8: byte 0 is 0xff"):
        prepare(described("files", path, tmp_path, workers=2), progress=False)


@pytest.mark.all
def test_what_is_done_is_not_read_again(small_sections, tmp_path, monkeypatch):
    config = described("jsonl", written("jsonl", tmp_path / "text"), tmp_path)
    prepare(replace(config, cache_dir=str(tmp_path / "undisturbed")), progress=False)
    kind, read = SOURCES.get("jsonl"), []
    documents = kind.documents

    def noted(self, *arguments):
        for document in documents(self, *arguments):
            read.append(document.place)
            yield document

    monkeypatch.setattr(kind, "documents", noted)
    monkeypatch.setattr("seqtrain.data.corpus.check_first_documents", lambda *arguments: None)
    for instant in (10, 15, 20):
        process = forked(prepare_and_die, config, instant)
        process.join()
        assert process.exitcode != 0
    done = finished(config, tmp_path / "cache")
    read.clear()
    prepare(config, progress=False)
    assert read
    assert done
    # Looked at again are the line in which a group ended, and the first of a section by those who end before it.
    assert not [place for place in read if any(behind_first_line(begin) < place < end.place for begin, end in done)]
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")


def behind_first_line(begin):
    """The last place where the first line of a section can begin: up to two empty ones come before."""
    return Place(begin.place.file, begin.place.at + 2)


@pytest.mark.full
def test_killed_at_twenty_moments_processes_make_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "SECTION_BYTES", 1000)
    config = described("jsonl", written("jsonl", tmp_path / "text"), tmp_path, workers=2)
    prepare(replace(config, workers=1, cache_dir=str(tmp_path / "undisturbed")), progress=False)
    moments = 0
    # Always a little later than before: each goes on where the one before was killed.
    for instant in range(2, 200):
        process = forked(prepare_and_die, config, instant // 3)
        process.join()
        if process.exitcode == 0:
            break
        moments += 1
    prepare(config, progress=False)
    print(f"killed {moments} times")
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")
    assert moments >= 20


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_200_megabytes_by_1_2_and_4_processes(tmp_path):
    path = large_text(tmp_path / "large.jsonl", 200 * 10**6)
    found = {}
    for workers in (1, 2, 4):
        cache = tmp_path / f"cache-{workers}"
        config = DataConfig(source="jsonl", path=str(path), cache_dir=str(cache), held_out=0.02, workers=workers)
        began = time.perf_counter()
        prepare(config, progress=False)
        print(f"{workers} processes: {time.perf_counter() - began:.1f} s")
        (folder,) = [entry for entry in cache.iterdir() if entry.is_dir()]
        found[workers] = {file.name: sha256_of(file) for file in folder.iterdir() if file.suffix != ".verified"}
        shutil.rmtree(cache)
    assert len(found[1]) > 40
    assert found[1] == found[2] == found[4]


def large_text(file, size):
    """JSON lines of made-up words, `size` bytes in all."""
    words = [f"{sentence(seed, 300)} {seed}" for seed in range(500)]
    chance = random.Random(0)
    with file.open("w") as opened:
        while opened.tell() < size:
            opened.write(json.dumps({"text": " ".join(chance.choices(words, k=chance.randrange(9)))}) + "\n")
    return file


def finished(config, cache):
    """The stretches `[begin, end)` of the text that the log in `cache` says are done."""
    folders = [folder for folder in cache.iterdir() if folder.is_dir()] if cache.exists() else []
    if not folders or not (folders[0] / "progress.log").exists():
        return []
    key = json.loads((folders[0] / "progress.log").read_text().splitlines()[0])
    text = ingest.Text(config, ingest.open_sources(config), load_tokenizer(config))
    divided = sections.divide(text.sources, text.section_bytes, text.tokenizer.ends_token)
    states = {group.state.section: group.state for group in ProgressLog(folders[0], key).groups()}
    return [(divided[number].begin, state.cursor) for number, state in states.items()]
