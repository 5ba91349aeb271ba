import numpy as np
import pytest

from seqtrain.data.shards import HEADER, Shard, ShardEntry, ShardWriter
from seqtrain.errors import DataError


def write(folder, vocab_size, parts):
    writer = ShardWriter(folder / "a.bin", vocab_size)
    for ids, starts in parts:
        writer.append(np.array(ids), np.array(starts, dtype=np.int64))
    return writer.close()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    entry = write(tmp_path, vocab_size, [([1, 2, vocab_size - 1], [0]), ([4, 5], [1]), ([], [])])
    shard = Shard.open(tmp_path, entry, vocab_size)
    shard.verify()
    assert shard.ids().dtype == dtype
    assert shard.ids().tolist() == [1, 2, vocab_size - 1, 4, 5]
    assert shard.starts().tolist() == [0, 4]
    assert (entry.tokens, entry.starts) == (5, 2)
    inside_one_document = Shard.open(tmp_path, write(tmp_path, vocab_size, [([1, 2, 3], [])]), vocab_size)
    inside_one_document.verify()
    assert inside_one_document.starts().tolist() == []


def test_nothing_is_visible_before_the_shard_is_whole(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", 257)
    writer.append(np.array([1]), np.array([0]))
    assert not (tmp_path / "a.bin").exists()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


@pytest.fixture
def entry(tmp_path):
    return write(tmp_path, 300, [(range(100), [0, 40])])


def test_every_flipped_bit_is_found(tmp_path, entry):
    file = tmp_path / "a.bin"
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.bin"):
            Shard.open(tmp_path, entry, 300).verify()
    file.write_bytes(content)
    Shard.open(tmp_path, entry, 300).verify()


def test_truncated_too_long_missing_and_of_another_kind(tmp_path, entry):
    file = tmp_path / "a.bin"
    content = file.read_bytes()
    for damaged, message in (
        *((content[:size], f"truncated: {size} bytes, expected {len(content)} for 100") for size in (0, 10, 39)),
        (content + b"\0", "too long"),
        (b"NUMPY" + content[5:], "not a token shard"),
        (content[:8] + b"\2" + content[9:], "shard version 2, this seqtrain reads 1"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            Shard.open(tmp_path, entry, 300)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.bin: can't be read \(No such file"):
        Shard.open(tmp_path, entry, 300)


def test_a_foreign_vocabulary(tmp_path, entry):
    with pytest.raises(DataError, match="made for 300 token ids, but the tokenizer has 257"):
        Shard.open(tmp_path, entry, 257)
    foreign = write(tmp_path, 300, [([1, 2, 300], [0])])
    with pytest.raises(DataError, match=f"id 300 at byte {HEADER.size + 4}, but ids are below 300"):
        Shard.open(tmp_path, foreign, 300).verify()


def test_starts_must_rise_inside_the_shard(tmp_path):
    for starts in ([5, 5], [7, 3], [0, 10]):
        entry = write(tmp_path, 300, [(range(10), starts)])
        with pytest.raises(DataError, match="document starts do not rise"):
            Shard.open(tmp_path, entry, 300).verify()


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, entry):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "a.bin")
    for name in ("../a.bin", str(tmp_path / "a.bin"), "link.bin", "..", "", "sub/../../a.bin"):
        with pytest.raises(DataError, match="shards must be plain files of that folder"):
            Shard.open(folder, ShardEntry(name, entry.tokens, entry.starts, entry.sha256), 300)
