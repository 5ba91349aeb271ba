"""A checkpoint is visible only when whole, believed only when undamaged, and never a pickle."""

import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from seqtrain.errors import CheckpointError, DamagedError
from seqtrain.models import LanguageModel
from seqtrain.runtime import slices
from seqtrain.runtime.checkpoint import Progress, find, read
from seqtrain.runtime.ranks import is_lost_peer
from seqtrain.runtime.resolving import typed_pretrain_config
from tests.runtime.runtime_cases import as_it_was_at, change, folder_of, losses, small_config, train_on

SLICES = "rank-00000.2.safetensors"
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
    assert {path.name for path in newest.folder.iterdir()} == {"manifest.json", SLICES}
    weights = newest.state_dict()
    model = LanguageModel(finished.model, finished.mixer, vocab_size=257)
    assert weights.keys() == dict(model.named_parameters()).keys(), "tied weights are stored once"
    newest.load_weights(model)
    assert all((weights[name] == value).all() for name, value in model.named_parameters())
    # Any reader of safetensors reads a file of slices.
    stored = load_file(newest.folder / SLICES)
    assert all(torch.equal(stored[f"{name}:weight"], value.flatten()) for name, value in weights.items())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [3, 500, -20_000, -3], ids=["size", "header", "numbers", "hashes"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(root, caplog, place):
    flip(root / "step-00000006" / SLICES, place)
    with caplog.at_level(logging.WARNING):
        assert find(root).progress.step == 3
    assert f"step-00000006: {SLICES} is damaged" in caplog.text


def test_who_reads_weights_reads_and_checks_nothing_else(root, finished):
    """A flipped bit in the moments harms only who needs them."""
    newest, model = read(root / "step-00000006"), LanguageModel(finished.model, finished.mixer, vocab_size=257)
    tensors = newest.tensors()
    values = {name: tensors.range(name, "weight", 0, math.prod(shape)) for name, shape in tensors.shapes.items()}
    assert tensors.bytes < 0.4 * (newest.folder / SLICES).stat().st_size
    path = newest.folder / SLICES
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    moment = json.loads(path.read_bytes()[8:header])["blocks.0.mlp.up.weight:exp_avg"]["data_offsets"][0]
    flip(path, header + moment)
    newest.load_weights(model)
    assert all(torch.equal(values[name], each.flatten()) for name, each in model.named_parameters())
    with pytest.raises(DamagedError, match=f"{SLICES} is damaged"):
        newest.tensors().range("blocks.0.mlp.up.weight", "exp_avg", 0, 5)


def test_a_missing_shortened_or_changed_file_is_found(root):
    newest = root / "step-00000006"
    weights, manifest = newest / SLICES, newest / "manifest.json"
    size = weights.stat().st_size
    changed = json.loads(manifest.read_text())
    changed["progress"]["step"] = 5
    for damage, message in (
        (lambda: os.truncate(weights, size - 1), f"{SLICES} has {size - 1} bytes instead of {size}"),
        (weights.unlink, f"{SLICES} is missing"),
        (lambda: manifest.write_text(json.dumps(changed)), "was changed after it was written"),
        (lambda: manifest.write_text("[]"), r"manifest\.json: damaged at its start"),
        (manifest.unlink, r"manifest\.json: missing; so the checkpoint is incomplete"),
    ):
        damage()
        with pytest.raises(CheckpointError, match=message):
            read(newest)


@pytest.mark.all
def test_a_run_resumes_before_a_damaged_newest_checkpoint(finished):
    damaged = [as_it_was_at(finished, 6, f"past-damage-{number}") for number in range(2)]
    newest = [folder_of(config).checkpoints / "step-00000006" / SLICES for config in damaged]
    # What is missing is seen at once, what is wrong where it is read.
    newest[0].write_bytes(b"")
    flip(newest[1], -20_000)
    train_on(*damaged)
    for config in damaged:
        assert losses(config) == losses(finished)
        assert find(folder_of(config).checkpoints).progress.step == 6


@pytest.mark.all
def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    config = small_config(tmp_path, parallel={"data": 2})
    whole = change(config, "whole", checkpoint={"every": 1, "keep": 3})
    train_on(whole)
    kept = sorted(path.name for path in folder_of(whole).checkpoints.iterdir())
    assert kept == ["step-00000004", "step-00000005", "step-00000006"], "only the newest"
    write = slices.write_block

    def killed_in_the_second(out, block):
        if os.environ["RANK"] == "1" and "step-00000006" in out.name:
            os.kill(os.getpid(), signal.SIGKILL)
        write(out, block)

    with monkeypatch.context() as patch:
        patch.setattr(slices, "write_block", killed_in_the_second)
        with pytest.raises(RuntimeError) as caught:
            train_on(config)
    assert is_lost_peer(caught.value), "this is what Ray is to restart the ranks after"
    root = folder_of(config).checkpoints
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000006"]
    assert not (root / "step-00000006" / "manifest.json").exists()
    assert find(root).progress.step == 3
    train_on(config)
    assert losses(config) == losses(whole)
    for folder in root.iterdir():
        assert {path.name for path in folder.iterdir()} == {"manifest.json", *read(folder).manifest.files}


@pytest.mark.all
def test_a_rank_that_cannot_write_stops_all_and_keeps_what_is_there(tmp_path, monkeypatch):
    config = small_config(tmp_path, parallel={"data": 2})
    write = slices.write_block

    def full(out, block):
        if os.environ["RANK"] == "1" and "step-00000003" in out.name:
            raise OSError(28, "No space left on device")
        write(out, block)

    monkeypatch.setattr(slices, "write_block", full)
    with pytest.raises(CheckpointError, match=r"can't be written: rank 1: .*No space left on device; older check"):
        train_on(change(config, checkpoint={"every": 1}))
    assert find(folder_of(config).checkpoints).progress.step == 2


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
