"""Files of slices: whatever divides a tensor, any range of it comes back, and is checked by what is read of it."""

import hashlib
import io
import math
import os
import random
import signal
import time
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from seqtrain.errors import CheckpointError, DamagedError
from seqtrain.parallel.tensor import Division
from seqtrain.runtime import saving, slices
from seqtrain.runtime.checkpoint import Progress, find
from seqtrain.runtime.lease import take
from seqtrain.runtime.saving import Saver
from seqtrain.runtime.slices import Contents, Parts, Piece, SlicedTensors, contents_of, named, write_slices


def stored(folder, ranks):
    """Writes the pieces of each rank, and gives what reads them."""
    hashes, contents, shapes = {}, {}, {}
    for rank, (pieces, shape) in enumerate(ranks):
        with (folder / f"{rank}").open("wb") as out:
            hashes[f"{rank}"] = write_slices(out, dict(named(pieces)))
        contents[f"{rank}"] = contents_of(pieces, {})
        shapes |= shape
    return SlicedTensors(folder, hashes, shapes, contents)


@pytest.mark.parametrize("seed", range(6))
def test_any_range_of_a_divided_tensor_comes_back(tmp_path, seed):
    chance = random.Random(seed)
    shape = [chance.randint(1, 7) * 4 for _ in range(chance.randint(1, 3))]
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    dim = chance.randrange(len(shape))
    division = Division(dim, (shape[dim] // 2, shape[dim] - shape[dim] // 2))
    tensor, data = chance.choice([1, 2, 3]), chance.choice([1, 2, 5])
    ranks = []
    for place, part in product(range(tensor), range(data)):
        cuts = [(dim, division.places(place, tensor))] if tensor > 1 else []
        own = division.own(whole, place, tensor).flatten() if cuts else whole.flatten()
        begin, end = len(own) * part // data, len(own) * (part + 1) // data
        pieces = (
            [Piece("w", begin, {"weight": own[begin:end], "exp_avg": -own[begin:end]}, cuts)] if begin < end else []
        )
        ranks.append((pieces, {"w": shape}))
    tensors = stored(tmp_path, ranks)
    for _ in range(10):
        first, last = sorted(chance.choices(range(whole.numel() + 1), k=2))
        assert torch.equal(tensors.range("w", "exp_avg", first, last), -whole.flatten()[first:last])
    with pytest.raises(DamagedError, match="w is incomplete"):
        SlicedTensors(tmp_path, {}, {"w": shape}, {}).range("w", "weight", 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_range_is_read_by_blocks(tmp_path, dtype):
    numbers = 300_000
    whole = torch.arange(numbers).remainder(2 if dtype == torch.bool else 100).to(dtype)
    tensors = stored(tmp_path, [([Piece("w", 0, {"weight": whole})], {"w": [numbers]})])
    assert torch.equal(tensors.range("w", "weight", 1000, 1010), whole[1000:1010])
    # Beside the blocks, the header and a hash for each block.
    block = slices.block_bytes(numbers * dtype.itemsize)
    assert tensors.bytes <= 2 * block + 32 * slices.BLOCKS * 2 + 300
    path = tmp_path / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.equal(tensors.range("w", "weight", 0, 10), whole[:10]), "what is read is whole"
    with pytest.raises(DamagedError, match="0 is damaged"):
        tensors.range("w", "weight", 0, numbers)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F31"},
        {"data_offsets": [0, 10**9]},
        {"data_offsets": [-4, 36]},
        {"shape": [11]},
        {"shape": ["ten"]},
        {"data_offsets": 7},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused_though_its_hash_is_right(tmp_path, entry, monkeypatch):
    real = slices.json.dumps

    def lie(told, **how):
        return real({key: {**each, **(entry if key == "w:weight" else {})} for key, each in told.items()})

    monkeypatch.setattr(slices, "json", SimpleNamespace(dumps=lie, loads=slices.json.loads))
    tensors = stored(tmp_path, [([Piece("w", 0, {"weight": torch.ones(10)})], {"w": [10]})])
    with pytest.raises(DamagedError, match="0 is damaged"):
        tensors.range("w", "weight", 0, 10)


@pytest.mark.parametrize(
    "cuts", [[(2, [(0, 1)])], [(0, [(0, 5)])], [(0, [(2, 1)])], [(0, [(-1, 1)])], [(0, [])]], ids=str
)
def test_a_part_that_leaves_its_tensor_is_refused(tmp_path, cuts):
    contents = {"f": Contents({"w": (0, 9)}, {"w": cuts})}
    with pytest.raises(ValueError, match="has no part"):
        Parts([4, 3], cuts)
    with pytest.raises(DamagedError, match="w can't be put together"):
        SlicedTensors(tmp_path, {"f": ""}, {"w": [4, 3]}, contents).range("w", "weight", 0, 9)


class FewRanks:
    """One rank alone."""

    rank, count, first = 0, 1, True

    def gather(self, value):
        return [value]


class Held:
    """Stands for an engine: what it holds at a step follows from the step."""

    optimizer_state = SimpleNamespace(states=lambda: [("w:0.mean", torch.ones(3, 3))], numbers=lambda: {"sum": 0.1})

    def __init__(self, step, numbers=5000):
        self.values = torch.arange(numbers, dtype=torch.float32) + step

    def pieces(self, *, besides, moments):
        yield Piece("w", 0, {"weight": self.values, "exp_avg": -self.values})

    def shapes(self, *, besides):
        return {"w": [len(self.values)]}


def saver_in(folder, keep=2):
    lease = take(folder / ".epochs", "test", seconds=0.2)
    return Saver(folder / "checkpoints", FewRanks(), lease, keep=keep, for_good=lambda step: False)


def save(saver, step, numbers=5000):
    saver.save(Held(step, numbers), Progress(step=step, taken=step), fingerprint={"a": 1}, tracking_id="")


def test_saves_follow_each_other_and_the_oldest_go(tmp_path):
    saver = saver_in(tmp_path)
    for step in (1, 2, 3):
        save(saver, step)
    saver.wait()
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    found = find(tmp_path / "checkpoints")
    assert torch.equal(found.state_dict()["w"], Held(3).values)
    assert found.manifest.numbers == {"sum": 0.1}
    assert torch.equal(found.tensors().states("w", [0])[0]["mean"], torch.ones(3, 3))


MOMENTS = 20


def test_killed_at_any_moment_of_a_save_it_leaves_a_whole_checkpoint(tmp_path):
    """The first is whole, the second or third is being written; each kill is at another operation on files."""
    operations = count_operations(tmp_path / "counted")
    assert operations > MOMENTS
    newest = set()
    for moment in range(MOMENTS):
        folder = tmp_path / f"{moment}"
        at = 1 + moment * (operations - 1) // (MOMENTS - 1)
        assert os.WTERMSIG(forked(lambda folder=folder, at=at: three_saves(folder, kill_at=at))) == signal.SIGKILL
        found = find(folder / "checkpoints")
        step = found.progress.step
        assert torch.equal(found.state_dict()["w"], Held(step).values), moment
        newest.add(step)
        # What the next start does.
        again = saver_in(folder)
        save(again, 4)
        again.wait()
        files = {path.name for folder in (folder / "checkpoints").iterdir() for path in folder.iterdir()}
        left = [name for name in files if (name.endswith(".json") and name != "manifest.json") or "partial" in name]
        assert find(folder / "checkpoints").progress.step == 4
        assert not left
    assert newest == {1, 2, 3}, "kills fall before and after the moment at which a save is a checkpoint"


def forked(work):
    """The status with which a child ends that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def three_saves(folder, kill_at=None, count=None):
    saver = saver_in(folder)
    save(saver, 1)
    saver.wait()
    done = [0]

    def before_each(work):
        def counted(*arguments, **how):
            done[0] += 1
            if done[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **how)

        return counted

    slices.write_block = before_each(slices.write_block)
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, before_each(getattr(os, name)))
    for step in (2, 3):
        save(saver, step)
    saver.wait()
    if count:
        count.write_text(str(done[0]))


def count_operations(folder):
    folder.mkdir()
    assert forked(lambda: three_saves(folder / "run", count=folder / "count")) == 0
    return int((folder / "count").read_text())


def test_training_stands_still_for_little_of_the_time_of_writing(tmp_path, monkeypatch):
    """A store that takes 1 MB a second: 0.8 MB are written."""
    write, rate = slices.write_block, 1e6

    def slow(out, block):
        time.sleep(len(block) / rate)
        write(out, block)

    monkeypatch.setattr(slices, "write_block", slow)
    saver = saver_in(tmp_path)
    save(saver, 1, numbers=100_000)
    steps = 0
    while saver.busy:
        steps += 1
        time.sleep(0.01)
    saver.wait()
    assert saver.writing > 0.8
    assert saver.blocked < 0.05 * saver.writing
    assert steps > 10, "training goes on"
    assert torch.equal(find(tmp_path / "checkpoints").state_dict()["w"], Held(1, 100_000).values)


def test_what_is_trained_on_is_not_what_is_written(tmp_path, monkeypatch):
    """A save holds what there was when it began."""
    saver, engine = saver_in(tmp_path), Held(1)
    monkeypatch.setattr(saving, "write_slices", lambda *given: (time.sleep(0.2), write_slices(*given))[1])
    saver.save(engine, Progress(step=1, taken=1), fingerprint={}, tracking_id="")
    engine.values.zero_()
    saver.wait()
    assert torch.equal(find(tmp_path / "checkpoints").state_dict()["w"], Held(1).values)


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path, monkeypatch):
    saver = saver_in(tmp_path)
    save(saver, 1)
    saver.wait()

    def full(out, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slices, "write_block", full)
    save(saver, 2)
    while saver.busy:
        time.sleep(0.01)
    assert saver.failed
    with pytest.raises(CheckpointError, match=r"step-00000002: can't be written: rank 0: .*No space left on device"):
        saver.wait()
    assert find(tmp_path / "checkpoints").progress.step == 1


def test_a_file_is_hashed_as_it_is_written(tmp_path):
    out = io.BytesIO()
    told = write_slices(out, {"w:weight": torch.ones(1000), "w:0.step": torch.tensor(3.0)})
    content = out.getvalue()
    header = 8 + int.from_bytes(content[:8], "little")
    hashes = content[-32 * 3 :]
    assert hashlib.sha256(content[:header] + hashes).hexdigest() == told
    assert hashes[:32] == hashlib.sha256(content[header : header + 2048]).digest()
