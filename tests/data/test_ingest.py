import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from seqtrain.data import corpus as corpus_module
from seqtrain.data import prepare
from seqtrain.data.ingest import open_sources
from seqtrain.data.shards import ShardWriter
from seqtrain.errors import ConfigError, DataError


def content(cache):
    """Every file of the only corpus in `cache` that decides what is read, by name."""
    (folder,) = [entry for entry in cache.iterdir() if entry.is_dir()]
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".verified"}


def prepare_and_die(config, instant):
    """Prepares the corpus, but gets SIGKILL at the `instant`-th write, sync or rename."""
    left = [instant]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    ShardWriter.append = counted(ShardWriter.append)
    prepare(config, progress=False)


def forked(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.all
@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("bpe", marks=pytest.mark.full)])
def test_killed_at_any_instant_it_ends_in_the_same_bytes(config, tokenizer, bpe_folder, small_steps, tmp_path):
    if tokenizer == "bpe":
        config = replace(config, tokenizer=str(bpe_folder), shard_tokens=1000)
    prepare(replace(config, cache_dir=str(tmp_path / "undisturbed")), progress=False)
    expected = content(tmp_path / "undisturbed")
    assert len([name for name in expected if name.startswith("train")]) > 3
    deaths = 0
    # One death per attempt, always a little later than the attempt before began: many different instants in one ingest.
    for instant in range(1, 200, 3):
        process = forked(prepare_and_die, config, instant)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    assert deaths > 5
    assert content(tmp_path / "cache") == expected


@pytest.mark.full
def test_killed_once_at_every_instant(config, small_steps, tmp_path):
    config = replace(config, shard_tokens=12_000)
    prepare(replace(config, cache_dir=str(tmp_path / "undisturbed")), progress=False)
    expected = content(tmp_path / "undisturbed")
    for instant in range(0, 1000, 2):
        cache = tmp_path / f"cache-{instant}"
        process = forked(prepare_and_die, replace(config, cache_dir=str(cache)), instant)
        process.join()
        if process.exitcode == 0:
            break
        prepare(replace(config, cache_dir=str(cache)), progress=False)
        # A run that dies after its last rename but one leaves its notes next to the whole corpus.
        found = content(cache)
        assert {name: found[name] for name in expected} == expected
    assert 20 < instant < 1000


@pytest.mark.all
def test_finished_shards_are_not_made_again(config, small_steps, tmp_path):
    forked(prepare_and_die, config, 60).join()
    (folder,) = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    before = {file.name: file.stat().st_ino for file in folder.glob("train-*.bin")}
    assert before
    assert not (folder / "manifest.json").exists()
    corpus = prepare(config, progress=False)
    after = {file.name: file.stat().st_ino for file in folder.glob("train-*.bin")}
    # All but the newest, which may have been visible before progress.json named it.
    kept = sorted(before)[:-1]
    assert kept
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert corpus.train.bytes + corpus.held_out.bytes == sum(source.total for source in open_sources(config))


@pytest.mark.all
def test_two_processes_at_once_make_one_corpus(config, small_steps, tmp_path):
    log = tmp_path / "log"

    def noted(*arguments):
        with log.open("a") as opened:
            opened.write("ingest\n")
        return original(*arguments)

    def child():
        corpus_module.ingest = noted
        prepare(config, progress=False)

    original = corpus_module.ingest
    processes = [forked(child) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "ingest\n"
    prepare(replace(config, verify="always"), progress=False)


def test_text_that_changes_makes_another_corpus(config, text_folder):
    first = prepare(config, progress=False)
    file = text_folder / "a" / "03.txt"
    os.utime(file, ns=(1, 1))
    assert prepare(config, progress=False).folder != first.folder
    assert prepare(replace(config, held_out=0.3), progress=False).folder != first.folder


def test_text_that_changes_while_it_is_read_is_an_error(config, text_folder, monkeypatch):
    original = ShardWriter.append

    def meddle(self, *arguments):
        (text_folder / "a" / "03.txt").write_text("something else")
        return original(self, *arguments)

    monkeypatch.setattr(ShardWriter, "append", meddle)
    with pytest.raises(DataError, match="changed while it was read; run again"):
        prepare(config, progress=False)


def test_a_finished_corpus_is_opened_without_reading_the_text(config, monkeypatch):
    first = prepare(config, progress=False)
    monkeypatch.setattr(corpus_module, "ingest", lambda *arguments: pytest.fail("made again"))
    assert prepare(config, progress=False).folder == first.folder


def test_progress_is_shown_on_stderr(config, capsys):
    prepare(config, progress=True)
    shown = capsys.readouterr()
    assert "text to tokens" in shown.err
    assert shown.out == ""


def test_a_cache_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: can't write in .*file"):
        prepare(replace(config, cache_dir=str(tmp_path / "file" / "sub")), progress=False)


# VmHWM is this process's own peak; ru_maxrss would start from that of the process that started it.
MEASURE = """
import sys
from seqtrain.data import DataConfig, prepare

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

source, path, small, cache = sys.argv[1:]
prepare(DataConfig(source=source, path=small, cache_dir=cache, held_out=0), progress=False)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
config = DataConfig(source=source, path=path, cache_dir=cache, shard_tokens=2**22, held_out=0.02)
corpus = prepare(config, progress=False)
print(corpus.train.bytes + corpus.held_out.bytes, memory("VmHWM") - before)
"""


def write_rows(kind, file, texts):
    """Texts in the form of `kind`; text files get one line per text. Returns how many bytes of text that is."""
    if kind == "text":
        file.write_text("\n".join(texts))
        return file.stat().st_size
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        import pyarrow
        import pyarrow.parquet

        # One row group, so that whoever reads it whole holds everything.
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    return sum(map(len, texts))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to reset the peak")
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.full) for kind in ("text", "jsonl")), "parquet"]
)
@pytest.mark.all
def test_memory_does_not_grow_with_the_text(kind, tmp_path):
    """What readers take in any case differs from machine to machine; what a longer text adds does not."""
    small = tmp_path / f"small.{kind}"
    write_rows(kind, small, ["a few words"] * 3)

    def grown(mebibytes):
        big = tmp_path / f"{mebibytes}.{kind}"
        size = write_rows(kind, big, [os.urandom(2**10).hex() for _ in range(mebibytes * 2**9)])
        command = [sys.executable, "-c", MEASURE, kind, str(big), str(small), str(tmp_path / str(mebibytes))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        read, kibibytes = map(int, done.stdout.split())
        assert read == size
        return kibibytes / 1024

    # With the text held whole, 48 MiB more of it would be 48 MiB at least, and its tokens are twice that.
    assert grown(64) < grown(16) + 32
