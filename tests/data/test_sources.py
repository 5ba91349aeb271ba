import gzip
import json
import lzma
import re
import sysconfig
from itertools import pairwise

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from seqtrain.data import DataConfig, prepare
from seqtrain.data.ingest import open_sources
from seqtrain.data.sources import SOURCES
from seqtrain.data.sources import _base as base
from seqtrain.errors import ConfigError, DataError

TEXTS = [f"row {number}: naïve 東京\n" * (number % 5) for number in range(200)]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
        stream.flush()
        # Closing it closes the sink.
        stream.close()
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "zst": zstd, "xz": lzma.compress}


def write(kind, folder):
    """The same 200 texts in each form; returns what to put in data.path."""
    folder.mkdir(exist_ok=True)
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps({"text": text, "n": n}) + "\n" + "\n" * (n % 2) for n, text in enumerate(TEXTS)]
        for name, part in (("0.jsonl", lines[:70]), ("1.jsonl", lines[70:])):
            (folder / name).write_text("".join(part))
    elif kind in COMPRESS:
        lines = [json.dumps({"a": {"b": [0, text]}}) + "\n" + "\n" * (n % 2) for n, text in enumerate(TEXTS)]
        for name, part in ((f"0.jsonl.{kind}", lines[:70]), (f"1.jsonl.{kind}", lines[70:])):
            # Two streams in a file, as where something was appended.
            halves = ("".join(part[:40]).encode(), "".join(part[40:]).encode())
            (folder / name).write_bytes(b"".join(map(COMPRESS[kind], halves)))
    elif kind == "parquet":
        for name, texts in (("0.parquet", TEXTS[:70]), ("1.parquet", TEXTS[70:])):
            parquet.write_table(pyarrow.table({"text": texts}), folder / name, row_group_size=17)
    else:
        datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(200))}).save_to_disk(folder)
    return str(folder)


def config_of(kind, path, **fields):
    if kind in COMPRESS:
        return DataConfig(source="jsonl", path=path, text_field="a.b.1", **fields)
    return DataConfig(source=kind, path=path, **fields)


def source(kind, path, **fields):
    return open_sources(config_of(kind, path, **fields))[0]


def text_of(document):
    return b"".join(piece for piece, _ in document.pieces()).decode()


KINDS = ["text", "jsonl", "parquet", "huggingface"]


@pytest.mark.parametrize("kind", [*KINDS, *COMPRESS])
def test_documents_come_in_order_and_can_be_entered_anywhere(kind, tmp_path):
    opened = source(kind, write(kind, tmp_path / kind))
    documents = list(opened.documents())
    assert [text_of(document) for document in documents] == TEXTS
    places = [*(document.place for document in documents), documents[-1].next_place]
    for skip in (0, 1, 17, 69, 70, 71, 150, 199, 200):
        entered = list(opened.documents(places[skip]))
        assert [text_of(document) for document in entered] == TEXTS[skip:]
        assert [document.place for document in entered] == places[skip:-1]
    assert sum(document.units for document in documents) == pytest.approx(opened.total, rel=0.02)


@pytest.mark.parametrize("kind", [*KINDS, *COMPRESS])
def test_a_whole_corpus_holds_every_text_once(kind, tmp_path):
    config = config_of(kind, write(kind, tmp_path / kind), cache_dir=str(tmp_path / "cache"), held_out=0.3)
    corpus = prepare(config, progress=False)
    assert corpus.train.bytes + corpus.held_out.bytes == sum(len(text.encode()) for text in TEXTS)
    assert corpus.manifest.empty_documents == 40
    texts = []
    for stream in (corpus.train, corpus.held_out):
        boundaries = [*stream.starts(0, stream.tokens).tolist(), stream.tokens]
        texts += [corpus.tokenizer.decode(stream.read(start, stop - 1)) for start, stop in pairwise(boundaries)]
    assert sorted(texts) == sorted(text for text in TEXTS if text)


def test_the_registry_finds_every_source():
    assert SOURCES.names == ("chat", "datatrove", "huggingface", "jsonl", "megatron", "parquet", "stdlib", "text")
    with pytest.raises(ConfigError, match=r"data\.source 'jsnl' is unknown; did you mean 'jsonl'\?"):
        open_sources(DataConfig(source="jsnl"))


def test_stdlib_is_this_pythons_own_and_nothing_else():
    opened = source("stdlib", "")
    names = {opened.name(file) for file in opened.files}
    assert str(opened.root) == sysconfig.get_path("stdlib")
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not {"test", "tests", "site-packages", "encodings"} & {part for name in names for part in name.split("/")}
    documents = list(opened.documents())
    held_out = sum(document.size for document in documents if document.held_out)
    assert held_out / opened.total == pytest.approx(0.05, abs=0.01)
    with pytest.raises(ConfigError, match=r"data\.path=x: data\.source=stdlib reads no path; use data=text"):
        source("stdlib", "x")


def test_equal_rows_fall_on_one_side(tmp_path):
    lines = [json.dumps({"text": f"text {number % 50}"}) for number in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sides = {}
    for document in source("jsonl", str(tmp_path), held_out=0.3).documents():
        sides.setdefault(text_of(document), set()).add(document.held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == {side for found in sides.values() for side in found}


def test_held_out_files_do_not_depend_on_the_folder(text_folder, tmp_path):
    def held_out(path):
        opened = source("text", str(path), held_out=0.2)
        return [d.name[len(str(opened.root)) :] for d in opened.documents() if d.held_out]

    copy = text_folder.rename(tmp_path / "elsewhere")
    assert held_out(copy) == held_out(copy.rename(text_folder))
    assert len(held_out(text_folder)) > 1


def test_one_file_is_cut_at_a_line_end(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {number}\n" for number in range(100)))
    train, tail = source("text", str(file), held_out=0.1).documents()
    assert (train.held_out, tail.held_out) == (False, True)
    assert text_of(train) + text_of(tail) == file.read_text()
    assert text_of(train).endswith("\n")
    assert tail.size / file.stat().st_size == pytest.approx(0.1, abs=0.02)
    assert [d.name for d in source("text", str(file), held_out=0.1).documents(tail.place)] == [tail.name]
    # Without lines it is not cut inside a character.
    file.write_text("東" * 1000, encoding="utf-8")
    for held_out in (0.1, 0.2, 0.25, 0.33):
        train, tail = source("text", str(file), held_out=held_out).documents()
        assert text_of(train) + text_of(tail) == "東" * 1000


def test_a_text_of_its_own_for_evaluation(text_folder, tmp_path):
    (tmp_path / "eval.txt").write_text("held out\n")
    places = {"path": text_folder, "held_out_path": tmp_path / "eval.txt", "cache_dir": tmp_path / "cache"}
    corpus = prepare(DataConfig(source="text", **{key: str(path) for key, path in places.items()}), progress=False)
    assert corpus.tokenizer.decode(corpus.held_out.read(0, corpus.held_out.tokens)) == "held out\n"
    assert corpus.train.bytes == sum(file.stat().st_size for file in text_folder.rglob("*.txt"))


def test_patterns_hidden_files_and_suffixes(tmp_path):
    for name in ("a.txt", "b.md", ".hidden.txt", ".git/c.txt", "sub/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")

    def names(path):
        return [file.relative_to(tmp_path).as_posix() for file in source("text", path).files]

    assert names(str(tmp_path)) == ["a.txt", "b.md", "sub/d.md"]
    assert names(str(tmp_path / "**/*.md")) == ["b.md", "sub/d.md"]


@pytest.mark.parametrize("text", [b"a\n" * 500, "東".encode() * 400, b"\x80" * 1000, "ab\n東京".encode() * 100])
def test_pieces_join_to_the_text_from_any_boundary(text, monkeypatch):
    monkeypatch.setattr(base, "PIECE_BYTES", 100)
    document = base.RowDocument("x", False, len(text), 1.0, base.START, base.START, text)
    pieces = list(document.pieces())
    assert b"".join(piece for piece, _ in pieces) == text
    assert all(0 < len(piece) <= 100 for piece, _ in pieces)
    assert len(pieces) > 5
    offset = pieces[2][1]
    assert list(document.pieces(offset)) == pieces[3:]
    if b"\n" in text:
        assert all(piece.endswith(b"\n") for piece, _ in pieces[:-1])
    if text[0] != 0x80:
        assert all(piece.decode() for piece, _ in pieces)


def ingest_error(tmp_path, **fields):
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(cache_dir=str(tmp_path / "cache"), **fields), progress=False)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_required_and_must_exist(kind):
    with pytest.raises(ConfigError, match=rf"data\.path: .* is required for data\.source={kind}"):
        source(kind, "")
    with pytest.raises(DataError, match=r"data\.path: /nowhere/x does not exist"):
        source(kind, "/nowhere/x")


def test_errors_in_text_name_file_and_byte(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"fine\n" * 10 + b"\xff\xfe rest\n" * 10)
    assert f"{file}: not UTF-8: byte 50 is 0xff" in ingest_error(tmp_path, source="text", path=str(file))
    options = {"invalid_utf8": "replace", "held_out": 0, "cache_dir": str(tmp_path / "cache")}
    corpus = prepare(DataConfig(source="text", path=str(file), **options), progress=False)
    assert "\ufffd\ufffd rest" in corpus.tokenizer.decode(corpus.train.read(0, corpus.train.tokens))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not a line of JSON"),
        ('{"body": "x"}', "no field 'text', the line holds fields ['body']"),
        ("[1]", "no field 'text', the line holds a list"),
        ("[" * 200_000, "not a line of JSON"),
        ('{"text": ' + "1" * 10_000 + "}", "field 'text' holds int, not text"),
        ('{"text": 5}', "field 'text' holds int, not text"),
        ('{"text": null}', "field 'text' holds nothing, not text"),
        ('{"text": "ab\\ud800"}', "not UTF-8: byte 2 is 0xed"),
    ],
)
def test_errors_in_rows_name_file_and_line(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    options = {"source": "jsonl", "path": str(file), "held_out": 0}
    assert f"{file}:3: {message}" in ingest_error(tmp_path, **options)
    assert f"{file}:1: no field 'body'" in ingest_error(tmp_path, text_field="body", **options)


def test_a_line_too_long_to_hold_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("seqtrain.data.sources.jsonl.LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"text": "x" * 200}))
    assert "a.jsonl:2: the line is longer than 100 bytes" in ingest_error(tmp_path, source="jsonl", path=str(tmp_path))


def test_errors_of_tables(tmp_path):
    path = write("parquet", tmp_path / "parquet")
    assert "no column 'body', only ['text']" in ingest_error(tmp_path, source="parquet", path=path, text_field="body")
    (tmp_path / "parquet" / "0.parquet").write_bytes(b"PAR1 nothing")
    assert "0.parquet: not a parquet file" in ingest_error(tmp_path, source="parquet", path=path)
    broken = pyarrow.array([b"fine\n", b"\xff\n"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "broken.parquet")
    options = {"source": "parquet", "path": str(tmp_path / "broken.parquet"), "held_out": 0}
    assert "broken.parquet: row 1: not UTF-8 at byte 0" in ingest_error(tmp_path, **options)
    assert (
        text_of(list(source(invalid_utf8="replace", kind="parquet", path=options["path"]).documents())[1]) == "\ufffd\n"
    )
    path = write("huggingface", tmp_path / "hf")
    assert "no column 'body'" in ingest_error(tmp_path, source="huggingface", path=path, text_field="body")
    (tmp_path / "hf" / "state.json").write_text("[]")
    assert "not a dataset that save_to_disk wrote" in ingest_error(tmp_path, source="huggingface", path=path)
    (tmp_path / "hf" / "state.json").unlink()
    assert "not a dataset that save_to_disk wrote" in ingest_error(tmp_path, source="huggingface", path=path)


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_damaged_compressed_file_is_named(tmp_path, kind):
    write(kind, tmp_path / "rows")
    file = tmp_path / "rows" / f"1.jsonl.{kind}"
    file.write_bytes(file.read_bytes()[:-30])
    options = {"source": "jsonl", "path": str(tmp_path / "rows"), "text_field": "a.b.1"}
    assert f"{file}: damaged {({'gz': 'gzip', 'zst': 'zstd'}).get(kind, kind)}, at byte " in ingest_error(
        tmp_path, **options
    )


def test_fields_within_fields(tmp_path):
    rows = [{"a": {"b": [{"c": text}], "d": 1}, "x.y": text} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "hf")
    for kind, path in (("jsonl", "rows.jsonl"), ("parquet", "rows.parquet"), ("huggingface", "hf")):
        for field in ("a.b.0.c", "x.y"):
            opened = source(kind, str(tmp_path / path), text_field=field)
            assert [text_of(document) for document in opened.documents()] == TEXTS
        for field in ("a.e", "a.b.1.c", "a.d.f", "x.z"):
            message = ingest_error(tmp_path, source=kind, path=str(tmp_path / path), text_field=field)
            assert re.search(rf"{path}.*: no (field|column) '{field}'.*; set data.text_field$", message)


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "hf")
    message = ingest_error(tmp_path, source="huggingface", path=str(tmp_path / "hf"))
    assert "holds the splits ['train', 'validation']; give one of them" in message


def test_nothing_to_train_on_or_to_hold_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    assert "no text to train on" in ingest_error(tmp_path, source="jsonl", path=str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    message = ingest_error(tmp_path, source="jsonl", path=str(tmp_path), held_out=1e-9)
    assert "no document of the 2" in message
    assert "data.held_out_path" in message
