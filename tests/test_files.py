"""Files that are whole or not there, refused manifests, registries, and peak memory that is this program's own."""

import json
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import dedent

import pytest

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import Manifest, create_new, replace_file, replacing
from seqtrain.memory import AnonymousPeak
from seqtrain.registry import Registry


def test_a_new_file_is_whole_or_not_there(tmp_path):
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            create_new(tmp_path / "large", bytes(101))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert list(tmp_path.iterdir()) == []
    assert [create_new(tmp_path / "new", content) for content in (b"first", b"second")] == [True, False]
    assert (tmp_path / "new").read_bytes() == b"first"


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole(tmp_path, durable):
    file = tmp_path / "file"
    for content in (b"old", b"new"):
        replace_file(file, content, durable=durable)
        assert file.read_bytes() == content
    with pytest.raises(ZeroDivisionError), replacing(file, durable=durable) as unfinished:
        unfinished.write_text("half") and 1 / 0
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda opened: synced.append(os.readlink(f"/proc/self/fd/{opened}")) or fsync(opened)
    )
    folder = tmp_path / "folder"
    with replacing(folder) as unfinished:
        (unfinished / "inside").mkdir(parents=True)
        (unfinished / "inside" / "file").write_text("text")
        assert not folder.exists()
    assert (folder / "inside" / "file").read_text() == "text"
    parts = [unfinished / "inside" / "file", unfinished / "inside", unfinished]
    assert sorted(synced[:3]) == sorted(map(str, parts)), "before it has its name"
    assert synced[3:] == [str(tmp_path)], "and then the name"


@dataclass(frozen=True)
class Notes(Manifest):
    error = CheckpointError
    remedy = "delete the folder"

    count: int
    sizes: dict[str, tuple[int, int]]


def test_a_manifest_is_read_as_it_was_written_or_refused(tmp_path):
    file, notes = tmp_path / "notes.json", Notes(3, {"a": (1, 2)})
    notes.write(file)
    assert Notes.read(file) == notes
    for content, message in (
        ("{", "damaged: "),
        ("[]", "damaged at its start: "),
        (json.dumps({"count": "three", "sizes": {}}), "damaged at count: "),
        (json.dumps({"count": 3}), "damaged at sizes: "),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=rf"^{file}: {message}.*; delete the folder$"):
            Notes.read(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"notes\.json: missing; delete the folder"):
        Notes.read(file)


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "_parts.py").write_text("raise RuntimeError('shared parts are not entries')")
    (folder / "cat.py").write_text(
        dedent("""
            from collections import OrderedDict

            class Base(OrderedDict): ...
        """)
    )
    (folder / "broken.py").write_text("raise RuntimeError('imported too early')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "zoo"
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


def test_a_file_is_an_entry_and_is_imported_when_asked_for(package):
    registry = Registry("animal", package, dict)
    assert registry.names == ("broken", "cat")
    assert registry.get("cat").__name__ == "Base"


def test_an_unknown_name_lists_the_nearest(package):
    with pytest.raises(ConfigError, match="animal 'cta' is unknown; did you mean 'cat'\\? Known: broken, cat"):
        Registry("animal", package, dict).get("cta")


CODE = """
from seqtrain.memory import peak_resident_bytes
before = peak_resident_bytes()
block = bytearray(200_000_000)
del block
print(before, peak_resident_bytes())
"""


def wait_until(holds: Callable[[], bool]) -> None:
    """Give other threads their turn until they have made `holds` true, a minute at most."""
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)


def test_the_peak_is_that_of_this_program_alone():
    held = bytearray(b"x" * 600_000_000)  # by the parent, when it forks
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert len(held) > before
    assert 150_000_000 < after - before < 300_000_000


def test_memory_without_a_file_is_counted_and_mapped_files_are_not(tmp_path):
    (tmp_path / "file").write_bytes(bytes(60_000_000))
    with AnonymousPeak() as peak:
        # Not from the heap, where memory may be left over that counted before.
        with mmap.mmap(-1, 40_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            block[:] = b"x" * 40_000_000
            # The watcher is another thread, which may not have had its turn while the block was filled.
            wait_until(lambda: peak.bytes > 35_000_000)
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) == 0
    assert 35_000_000 < peak.bytes < 90_000_000
