"""What a run goes on from: only what it made and what fits, with one line for all that is missing or damaged."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.runtime.checkpoint import MANIFEST, listed, read
from seqtrain.runtime.loading import open_run
from seqtrain.runtime.resume import begin, check_resumable, refuse_foreign
from seqtrain.runtime.run import _finished_summary
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    folder_of,
    records,
    session_for,
    small_config,
    train_on,
    write_text,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at steps 3 and 6."""
    config = small_config(tmp_path_factory.mktemp("finished"))
    train_on(config)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run, to be damaged."""
    copy = replace(finished, output_dir=str(tmp_path / "copy"))
    shutil.copytree(finished.output_dir, copy.output_dir)
    return copy


def check(config) -> None:
    """What the driver looks at before anything starts."""
    refuse_foreign(folder_of(config), config)
    check_resumable(folder_of(config), config, session_for(config).fingerprint)


def test_the_same_text_elsewhere_is_the_same_and_other_text_is_not(copied, tmp_path):
    check(change(copied, data={"path": str(write_text(tmp_path / "moved"))}))
    other = write_text(tmp_path / "other")
    (other / "0.txt").write_text("other words")
    with pytest.raises(
        CheckpointError, match=r"with data.content.text=\"\w+\", now \"\w+\"; .* start a new run from its"
    ):
        check(change(copied, data={"path": str(other)}))


def resign(folder: Path, **changes) -> None:
    """Puts a manifest with `changes` in place of that in `folder`."""
    manifest = replace(next(each for each in listed(folder.parent) if each.folder == folder).manifest, **changes)
    replace(manifest, sha256=manifest.signature()).write(folder / MANIFEST)


def test_another_tokenizer_is_refused_by_training_and_by_generation(copied):
    newest = folder_of(copied).checkpoints / "step-00000006"
    trajectory = listed(newest.parent)[0].manifest.trajectory
    trajectory["data"]["content"]["tokenizer"] = "of another vocabulary"
    resign(newest, trajectory=trajectory)
    with pytest.raises(CheckpointError, match=r"data.content.tokenizer=\"of another vocabulary\", now"):
        check(copied)
    with pytest.raises(CheckpointError, match=r"was trained with another tokenizer than data.tokenizer=bytes is now"):
        open_run(folder_of(copied).path)


def test_other_packages_are_a_warning(copied, caplog):
    resign(folder_of(copied).checkpoints / "step-00000006", versions={"torch": "1.0"})
    with caplog.at_level(logging.WARNING):
        check(copied)
    assert "was made with torch 1.0, now " in caplog.text


@pytest.mark.all
def test_copies_kept_by_hand_are_neither_resumed_from_nor_deleted(finished):
    config = as_it_was_at(finished, 3, "with-copies", checkpoint={"every": 1})
    root = folder_of(config).checkpoints
    kept = ["step-00000003-good", "step-best", "step-00000009"]
    for name in kept:
        shutil.copytree(root / "step-00000003", root / name)
    (root / "step-00000006").mkdir()
    (root / "step-00000006" / "notes.txt").write_text("in the way")
    train_on(config)
    assert [record["step"] for record in records(config)] == list(range(1, 7))
    assert {path.name for path in root.iterdir()} == {*kept, "step-00000005", "step-00000006"}
    newest = read(root / "step-00000006")
    assert {path.name for path in newest.folder.iterdir()} == {MANIFEST, "notes.txt", *newest.manifest.files}


def test_a_run_whose_checkpoints_are_lost_does_not_start_over(copied, caplog):
    root = folder_of(copied).checkpoints
    for damage in (
        lambda: [(each / MANIFEST).write_text("{}") for each in root.iterdir()],
        lambda: shutil.rmtree(root),
        lambda: root.write_text("a file"),
    ):
        damage()
        with pytest.raises(CheckpointError, match=r"a checkpoint of step 6 had been written, and none that is whole"):
            check(copied)
    root.unlink()
    (folder_of(copied).epochs / "saved").unlink()
    with caplog.at_level(logging.WARNING):
        check(copied)
    assert "no checkpoint had been written yet; it starts over from step 0" in caplog.text


def test_nothing_to_train_is_one_line(copied):
    newest = folder_of(copied).checkpoints / "step-00000006"
    for steps in (3, 6):
        new = change(copied, f"fresh-{steps}", checkpoint={"resume": str(newest)}, train={"steps": steps})
        with pytest.raises(CheckpointError, match=rf"holds step 6 already, so train.steps={steps} leaves nothing to"):
            check(new)


DAMAGES = [b"junk\n", b"\n", b'{"step": 7, "loss": 1.0\n', b"[" * 100_000 + b"\n", b'"step"\n', b'{"step": 8, "lo']


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_records_are_left_out(copied, damage, caplog):
    folder = folder_of(copied)
    before = {file: file.read_bytes() for file in (folder.metrics, folder.starts)}
    for file, content in before.items():
        file.write_bytes(content + damage)
    with caplog.at_level(logging.WARNING):
        begin(folder, copied)
    assert {file: file.read_bytes() for file in before} == before
    assert caplog.text.count("1 lines were damaged and are left out now") == 2
    check(copied)


def test_lost_metrics_are_said(copied, caplog):
    folder = folder_of(copied)
    folder.metrics.write_bytes(b"".join(folder.metrics.read_bytes().splitlines(keepends=True)[2:]))
    with caplog.at_level(logging.WARNING):
        check(copied)
    assert "metrics.jsonl: lines of 2 steps are lost, the first of step 1" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"a: [", b"\xff\xfe", b"[" * 5000])
def test_a_damaged_config_is_one_line(copied, content):
    folder_of(copied).config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^output_dir=\S+: config.yaml is damaged: .*") as caught:
        check(copied)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^run=\S+: config.yaml is damaged"):
        open_run(folder_of(copied).path)


@pytest.mark.parametrize("section", ["model", "schedule", "train"])
def test_a_config_without_a_section_is_damaged(copied, section):
    file = folder_of(copied).config
    whole = yaml.safe_load(file.read_bytes())
    for damaged in ({}, [], None):
        file.write_text(yaml.safe_dump(whole | {section: damaged}))
        with pytest.raises(ConfigError, match=rf"^output_dir=\S+: config.yaml is damaged: lacks {section}\."):
            check(copied)


@pytest.mark.parametrize("content", ["", '{"steps": 6, "stop', "[]", "{}", "[" * 100_000])
def test_a_damaged_summary_is_written_anew(copied, content, caplog):
    folder_of(copied).summary.write_text(content)
    assert _finished_summary(copied, folder_of(copied)) is None
    assert "summary.json: is damaged" in caplog.text


def test_a_manifest_that_leaves_its_folder_or_lacks_a_part_is_refused(copied):
    file = folder_of(copied).checkpoints / "step-00000006" / MANIFEST
    values = json.loads(file.read_text())
    # AdamW has no other numbers, and to leave out none changes nothing.
    for key in values.keys() - {"numbers"}:
        file.write_text(json.dumps({name: value for name, value in values.items() if name != key}))
        assert [each.progress.step for each in listed(file.parent.parent)] == [3], key
    file.write_text(json.dumps(values))
    entry = next(iter(values["files"].values()))
    resign_to = {"../model.safetensors": entry}
    resign(file.parent, files=resign_to)
    assert [each.progress.step for each in listed(file.parent.parent)] == [3]
