"""Damage to a large corpus is found while it is read, and stops the run."""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from seqtrain.data import open_corpus, verification
from seqtrain.data.shards import Shard
from seqtrain.data.verification import Stamps, Verification
from seqtrain.errors import DataError
from tests.data.test_corpus import flip


@pytest.fixture
def large(corpus, config, monkeypatch):
    """The small corpus, taken for one that is too large to be verified when it is opened, and never verified yet."""
    monkeypatch.setattr(verification, "AT_ONCE", 1000)
    for file in corpus.folder.glob("*.verified"):
        file.unlink()
    return open_corpus(corpus.folder, config)


def verified(monkeypatch):
    """The names of shards that are read whole from now on."""
    names, verify = [], Shard.verify
    monkeypatch.setattr(Shard, "verify", lambda shard, *stop: (names.append(shard.path.name), verify(shard, *stop))[1])
    return names


def passed(corpus, **options):
    """A verification that has come to the end of its share."""
    checked = Verification(corpus.to_verify, **options)
    with checked.running():
        for thread in threading.enumerate():
            if thread.name == "verify":
                thread.join()
    return checked


def test_ranks_share_out_what_is_to_be_verified(large, monkeypatch):
    names = verified(monkeypatch)
    for rank in range(3):
        passed(large, rank=rank, ranks=3).check()
    everything = [shards.entry(number).file for shards in large.indexes for number in range(len(shards))]
    assert sorted(names) == sorted(everything)
    # What is known to be right stays so until it changes.
    passed(large).check()
    os.utime(large.folder / "train-00001.bin")
    passed(large).check()
    assert names[len(everything) :] == ["train-00001.bin"]
    passed(large, always=True).check()
    assert len(names) == 2 * len(everything) + 1


def test_damage_is_told_by_the_rank_that_finds_it(large):
    flip(large.folder / "train-00001.bin")
    # Opened all the same, and read.
    large.train.read(0, large.train.tokens)
    passed(large, rank=0, ranks=2).check()
    found = passed(large, rank=1, ranks=2)
    with pytest.raises(DataError, match=r"train-00001\.bin: checksum is .*: the file is damaged; delete .* to rebuild"):
        found.check()
    assert Stamps(large.train.shards)[1] == 0


def test_what_was_read_and_not_yet_verified_is_known(large):
    end = large.train.shards.first(1)
    large.train.read(end - 5, end + 5)
    early = Verification(large.to_verify)
    touched, right = early.state
    assert np.flatnonzero(touched).tolist() == [0, 1]
    assert not right.any()
    early.verify(np.flatnonzero(touched > right))
    assert not (early.state[0] > early.state[1]).any()
    flip(large.folder / large.held_out.shards.entry(0).file)
    with pytest.raises(DataError, match=r"held_out-00000\.bin: checksum"):
        early.verify([len(large.train.shards)])


def test_nothing_is_verified_where_that_is_not_wanted(large, config):
    assert open_corpus(large.folder, replace(config, verify="never")).to_verify == ()


def test_a_writer_vouches_for_its_shards(corpus, config, monkeypatch):
    names = verified(monkeypatch)
    open_corpus(corpus.folder, config)
    assert names == []
