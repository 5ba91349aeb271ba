"""Folders of text: links, what can't be read, and what is left out; each said, and each file read once."""

import json
import logging
import os
from pathlib import Path

import pytest

from seqtrain.data import DataConfig, prepare
from seqtrain.data.ingest import open_sources
from seqtrain.errors import DataError
from tests.command_cases import refused


@pytest.fixture
def folder(tmp_path):
    """Three texts, one of them in a folder inside; beside it a folder with one more."""
    for name in ("text/a.txt", "text/b.txt", "text/in/c.txt", "beside/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"{name}: words\n" * 20)
    return tmp_path / "text"


def opened(path, kind="text"):
    [source] = open_sources(DataConfig(source=kind, path=str(path)))
    return source


def names(source):
    return [source.name(file) for file in source.files]


def left_out(source):
    return {reason: sorted(path.name for path in paths) for reason, paths in source.left_out.items()}


def test_links_are_followed_and_each_file_is_read_once(folder):
    (folder / "0-again").symlink_to(folder / "in")
    (folder / "0-again.txt").symlink_to(folder / "a.txt")
    (folder / "in" / "loop").symlink_to(folder)
    (folder / "more").symlink_to(folder.parent / "beside")
    (folder / "once-more").symlink_to(folder.parent / "beside")
    source = opened(folder)
    assert names(source) == ["a.txt", "b.txt", "in/c.txt", "more/d.txt"]
    again = ["0-again", "0-again.txt", "loop", "once-more"]
    assert left_out(source) == {"links to what is read anyway": again}
    by_pattern = opened(folder / "**" / "[ad].txt")
    assert names(by_pattern) == ["a.txt", "more/d.txt"]
    # A link is no second name of a file that is not read by its first.
    (folder / "0-first.jsonl").symlink_to(folder / "b.txt")
    assert names(opened(folder, "jsonl")) == ["0-first.jsonl"]


def test_a_folder_of_nothing_but_links_is_read(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "all").symlink_to(folder)
    assert names(opened(tmp_path / "links")) == ["all/a.txt", "all/b.txt", "all/in/c.txt"]


def test_what_is_left_out_is_named_with_its_reason(folder, tmp_path, caplog):
    (folder / "z.txt").symlink_to(folder / "nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / ".hidden.txt").write_text("x")
    expected = {"broken links": ["z.txt"], "neither files nor folders": ["pipe.txt"], "hidden": [".hidden.txt"]}
    assert left_out(opened(folder)) == expected
    (folder / "empty.txt").write_text("")
    told = "left out: 1 broken links (z.txt); 1 hidden (.hidden.txt); 1 neither files nor folders (pipe.txt)"
    config = DataConfig(source="text", path=str(folder), held_out=0.4, cache_dir=str(tmp_path / "cache"))
    for _ in ("read", "found again"):
        corpus = prepare(config, progress=False)
        assert corpus.about.endswith(f"1 empty documents, {told}")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"data: read 3 documents of 4 files, and 1 empty ones, {told}"]


def test_other_files_than_a_source_reads_are_counted(folder):
    (folder / "a.jsonl").write_text(json.dumps({"text": "x"}))
    (folder / "B.JSONL").write_text(json.dumps({"text": "y"}))
    (folder / "c.jsonl.bz2").write_bytes(b"BZh")
    source = opened(folder, "jsonl")
    assert names(source) == ["B.JSONL", "a.jsonl"]
    assert left_out(source) == {"not *.jsonl": ["a.txt", "b.txt", "c.jsonl.bz2", "c.txt"]}
    with refused("nothing to read in", DataError):
        opened(folder.parent / "beside", "jsonl")


def test_a_denied_folder_or_file_is_one_line(folder, monkeypatch):
    access, scan = os.access, os.scandir

    def denied(path):
        if Path(path).name == "in":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.txt" and access(path, mode))
    for path in (folder, folder / "*.txt"):
        with refused("data.path: no permission to read 1 files: a.txt in", DataError):
            opened(path)
    monkeypatch.setattr(os, "scandir", denied)
    for path in (folder, folder / "**" / "*.txt"):
        with refused("in: can't be listed (Permission denied), so its files would be missing", DataError):
            opened(path)


def test_neither_file_nor_folder_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refused("pipe is neither a file nor a folder", DataError):
        opened(tmp_path / "pipe")


def test_names_of_any_bytes_are_read_and_can_be_said(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("words\n")
    (tmp_path / os.fsdecode(b"\xfe.txt")).symlink_to("nowhere")
    source = opened(tmp_path)
    assert len(source.files) == 1
    assert source.passed_over == ", left out: 1 broken links (\\udcfe.txt)"


def test_compressed_text_is_said_to_be_that(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x1f\x8b\x08\x00rest")
    config = DataConfig(source="text", path=str(tmp_path), held_out=0.0, cache_dir=str(tmp_path / "cache"))
    with refused("a.txt: is gzip-compressed; unpack it", DataError):
        prepare(config, progress=False)
