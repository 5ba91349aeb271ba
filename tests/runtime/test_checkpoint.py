"""A checkpoint is visible only when whole, believed only when undamaged, and never a pickle."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from seqtrain.errors import CheckpointError
from seqtrain.models import LanguageModel
from seqtrain.runtime import checkpoint
from seqtrain.runtime.checkpoint import Progress, find, read
from seqtrain.runtime.ranks import is_lost_peer
from seqtrain.runtime.settings import typed_pretrain_config
from tests.runtime.runtime_cases import as_it_was_at, change, folder_of, losses, small_config, train_on

MADE_EARLIER = Path(__file__).with_name("made_by_0aa027e.tar.xz")  # the folder of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at steps 3 and 6."""
    config = small_config(tmp_path_factory.mktemp("finished"))
    train_on(config)
    return config


@pytest.fixture
def root(finished):
    """A copy of that run's checkpoints, to be damaged."""
    count = len(list(folder_of(finished).path.parent.iterdir()))
    return folder_of(as_it_was_at(finished, 6, f"copy-{count}")).checkpoints


def test_what_a_checkpoint_holds(finished, root):
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000006"]
    assert find(root / "none") is None
    newest = find(root)
    assert newest.progress == Progress(step=6, taken=6, skipped_in_a_row=0, tokens=6 * 8 * 32)
    files = {"manifest.json", "model.safetensors", "optimizer-00000.safetensors"}
    assert {path.name for path in newest.folder.iterdir()} == files
    weights = load_file(newest.folder / "model.safetensors")
    model = LanguageModel(finished.model, finished.mixer, vocab_size=257)
    assert weights.keys() == dict(model.named_parameters()).keys(), "tied weights are stored once"
    newest.load_weights(model)
    assert all((weights[name] == value).all() for name, value in model.named_parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer-00000.safetensors"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(root, caplog, file):
    path = root / "step-00000006" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"step-00000006: {file} is damaged"):
        read(root / "step-00000006")
    with caplog.at_level(logging.WARNING):
        assert find(root).progress.step == 3
    assert f"{file} is damaged" in caplog.text


def test_a_missing_shortened_or_changed_file_is_found(root):
    newest = root / "step-00000006"
    weights, manifest = newest / "model.safetensors", newest / "manifest.json"
    (newest / "optimizer-00001.safetensors").write_bytes(b"planted")
    assert "optimizer-00001.safetensors" not in read(newest).manifest.files, "a file the manifest does not name"
    size = weights.stat().st_size
    changed = json.loads(manifest.read_text())
    changed["progress"]["step"] = 5
    for damage, message in (
        (lambda: os.truncate(weights, size - 1), f"model.safetensors has {size - 1} bytes instead of {size}"),
        (weights.unlink, r"model\.safetensors is missing"),
        (lambda: manifest.write_text(json.dumps(changed)), "was changed after it was written"),
        (lambda: manifest.write_text("[]"), r"manifest\.json: damaged at its start"),
        (manifest.unlink, r"manifest\.json: missing; so the checkpoint is incomplete"),
    ):
        damage()
        with pytest.raises(CheckpointError, match=message):
            read(newest)


@pytest.mark.all
def test_a_run_resumes_before_a_damaged_newest_checkpoint(finished):
    config = as_it_was_at(finished, 6, "past-damage")
    (folder_of(config).checkpoints / "step-00000006" / "model.safetensors").write_bytes(b"")
    train_on(config)
    assert losses(config) == losses(finished)
    assert find(folder_of(config).checkpoints).progress.step == 6


@pytest.mark.all
def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    config = small_config(tmp_path, parallel={"data": 2})
    whole = change(config, "whole", checkpoint={"every": 1, "keep": 3})
    train_on(whole)
    kept = sorted(path.name for path in folder_of(whole).checkpoints.iterdir())
    assert kept == ["step-00000004", "step-00000005", "step-00000006"], "only the newest"
    write = checkpoint.save_file

    def killed_in_the_second(tensors, path):
        if os.environ["RANK"] == "1" and "step-00000006" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", killed_in_the_second)
        with pytest.raises(RuntimeError) as caught:
            train_on(config)
    assert is_lost_peer(caught.value), "this is what Ray is to restart the ranks after"
    root = folder_of(config).checkpoints
    assert sorted(path.name for path in root.iterdir()) == [".step-00000006.2.partial", "step-00000003"]
    assert find(root).progress.step == 3
    train_on(config)
    assert losses(config) == losses(whole)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.all
def test_a_rank_that_cannot_write_stops_all_and_keeps_what_is_there(tmp_path, monkeypatch):
    config = small_config(tmp_path, parallel={"data": 2})
    write = checkpoint.save_file

    def full(tensors, path):
        if os.environ["RANK"] == "1" and "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        return write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"can't be written: rank 1: .*No space left on device; older check"):
        train_on(config)
    assert find(folder_of(config).checkpoints).progress.step == 3


def test_weights_of_another_shape_or_name_are_refused(finished, root):
    for changes, message in (
        ({"width": 32}, r"step-00000006: .* has shape \[.*\], the model wants \["),
        ({"depth": 3}, r"step-00000006: blocks\.2\..* is not in both the checkpoint and the model"),
    ):
        model = LanguageModel(change(finished, model=changes).model, finished.mixer, vocab_size=257)
        with pytest.raises(CheckpointError, match=message):
            read(root / "step-00000006").load_weights(model)


@pytest.fixture
def earlier(tmp_path):
    """The config of a run of four steps that an earlier version made, and its folder with a checkpoint after two."""
    shutil.unpack_archive(MADE_EARLIER, tmp_path)
    folder = tmp_path / "made_by_0aa027e"
    return change(typed_pretrain_config(yaml.safe_load((folder / "config.yaml").read_text())), output_dir=str(folder))


def test_a_checkpoint_of_an_earlier_version_is_read(earlier):
    [found] = map(read, folder_of(earlier).checkpoints.iterdir())
    assert found.progress == Progress(step=2, taken=2, tokens=256)
    found.load_weights(LanguageModel(earlier.model, earlier.mixer, vocab_size=17))


@pytest.mark.all
def test_a_run_of_an_earlier_version_is_resumed(earlier):
    """Its last two steps are done again here, from its checkpoint after the second."""
    before = losses(earlier)
    train_on(earlier)
    assert len(before) == 4
    assert losses(earlier) == pytest.approx(before, rel=1e-5)
    assert folder_of(earlier).starts.read_text().count('"step": 2') == 1
