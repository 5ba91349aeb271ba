"""Writes that are whole or did not happen, and manifests that are refused where they are damaged."""

import json
import os
from dataclasses import dataclass

import pytest

from seqtrain.errors import CheckpointError
from seqtrain.files import Manifest, replace_file, replacing


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
