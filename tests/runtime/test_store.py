"""Checkpoints and their lease in an object store: a server of S3 in this process, in memory."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.files import create_new, place, read_range, remove_folder, replace_file
from seqtrain.runtime.checkpoint import MANIFEST, find, listed
from seqtrain.runtime.checks import check
from seqtrain.runtime.export import main as export
from seqtrain.runtime.lease import succeed, take
from seqtrain.runtime.loading import open_run, place_of_run
from seqtrain.runtime.resume import claimed
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.slices import SlicesFile, write_slices
from tests.runtime.runtime_cases import change, folder_of, losses, session_for, small_config, train_on

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    """A new bucket; ranks find its server by the environment, as those of a cluster do."""
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "of-a-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        served = server.ThreadedMotoServer(port=0, verbose=False)
        served.start()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{served.get_host_and_port()[1]}")
        place("s3://bucket/a").fs.mkdir("bucket")
        yield "s3://bucket"
        served.stop()


def test_of_all_that_create_a_file_at_once_one_is_told_so(bucket):
    file, told = place(f"{bucket}/race/file"), []

    def create(content):
        told.append((create_new(file, content), content))

    threads = [threading.Thread(target=create, args=(bytes([number]) * 10,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [content for won, content in told if won]
    assert file.read_bytes() == winner
    replace_file(file, b"other")
    assert read_range(file, 1, 3) == b"th"
    remove_folder(file.parent)
    assert not file.exists()


def test_a_second_start_is_kept_out_and_a_later_one_replaces_the_first(bucket, tmp_path):
    """On two machines: what they share is the store."""
    folders = [RunFolder(tmp_path / name, f"{bucket}/held") for name in ("first", "second")]
    leases = []
    with claimed(folders[0], "a", lease_seconds=0.4, began=folders[0].starts) as first:
        with (
            pytest.raises(ConfigError, match=r"checkpoint.store=s3://bucket/held: process .* is writing this run"),
            claimed(folders[1], "b", lease_seconds=0.4, began=folders[1].starts),
        ):
            pass
        leases += [first, succeed(first)]
        assert leases[1].of_checkpoints.epoch == leases[0].of_checkpoints.epoch + 1
        leases[1].check()
    taken = take(folders[1].epochs, "b", seconds=0.4, store=folders[1].kept_epochs)
    assert taken.of_checkpoints.epoch > leases[1].of_checkpoints.epoch
    with pytest.raises(ValueError, match=r"checkpoint.store=s3://bucket/held: process .* has taken over"):
        leases[1].check()


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("runs/mine", "must be KIND://PLACE, as in s3://bucket/prefix"),
        ("s3://", "must be KIND://PLACE"),
        ("simplecache::s3://bucket/a", "must be KIND://PLACE"),
        ("nowhere://bucket/a", r"nowhere"),
    ],
)
def test_what_is_no_store_is_one_line(tmp_path, store, message):
    with pytest.raises(ConfigError, match=f"checkpoint.store={store}: .*{message}"):
        check(change(small_config(tmp_path, runtime={"name": "ray"}), checkpoint={"store": store}))


def test_a_bucket_that_is_not_there_is_one_line(bucket, tmp_path):
    folder = RunFolder(tmp_path / "run", "s3://other-bucket/a")
    with (
        pytest.raises(ConfigError, match=r"checkpoint.store=s3://other-bucket/a: can't be written \(.*bucket"),
        claimed(folder, "a", lease_seconds=0.4, began=folder.starts),
    ):
        pass


@pytest.mark.parametrize("run", ["s3://other-bucket/a", "nowhere://bucket/a", "s3://"])
def test_a_run_that_is_not_there_is_one_line(bucket, run):
    with pytest.raises(ConfigError, match=f"^run={run}: "):
        open_run(place_of_run(run))


@pytest.mark.all
def test_a_run_is_resumed_generated_from_and_exported_elsewhere(bucket, tmp_path):
    config = small_config(tmp_path, parallel={"data": 2}, checkpoint={"every": 2})
    stored = change(config, "stored", checkpoint={"store": f"{bucket}/runs/mine"})
    train_on(change(config, "whole"), stored)
    kept = RunFolder(Path(stored.output_dir), stored.checkpoint.store)
    assert not folder_of(stored).checkpoints.exists()
    assert [each.progress.step for each in listed(kept.checkpoints)] == [6, 4]
    newest = find(kept.checkpoints)
    assert {path.name for path in newest.folder.iterdir()} == {MANIFEST, *newest.manifest.files}
    assert losses(stored) == losses(change(config, "whole"))
    # Another machine has nothing but the store; the newest checkpoint is damaged there.
    shutil.rmtree(stored.output_dir)
    file = newest.folder / next(iter(newest.manifest.files))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    elsewhere = change(stored, "elsewhere", parallel={"data": 1})
    train_on(session_for(elsewhere))
    assert losses(elsewhere)[-2:] == pytest.approx(losses(change(config, "whole"))[-2:], rel=1e-5)
    assert len(losses(elsewhere)) == 6, "its records came from the store"
    again = find(RunFolder(Path(elsewhere.output_dir), stored.checkpoint.store).checkpoints)
    assert again.progress.step == 6
    _, model, _ = open_run(place(f"{bucket}/runs/mine"))
    weights = again.state_dict()
    assert all((weights[name] == value).all() for name, value in model.named_parameters())
    assert export([f"run={bucket}/runs/mine", f"output_dir={tmp_path / 'exported'}"]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_only_the_range_that_is_read_is_asked_for(bucket, tmp_path):
    file = place(f"{bucket}/ranges/rank-00000.1.safetensors")
    with file.open("wb") as out:
        sha256 = write_slices(out, {"w:weight": torch.arange(300_000.0)})
    reader = SlicesFile(file, sha256)
    assert torch.equal(reader.range("w:weight", 7000, 7010), torch.arange(7000.0, 7010.0))
    assert reader.bytes < 50_000
