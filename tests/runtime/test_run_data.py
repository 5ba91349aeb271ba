"""What a run does about its data besides training on them: it verifies them, waits for them, keeps evaluation short."""

import datetime
import json
import logging
import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist

from seqtrain.data import prepare, verification
from seqtrain.errors import DataError
from seqtrain.runtime.lease import newest
from seqtrain.runtime.ranks import this_process
from seqtrain.runtime.run import _warn_of_long_evaluation
from tests.data.test_corpus import flip
from tests.runtime.runtime_cases import change, folder_of, records, small_config, train_on


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A run of two ranks whose corpus is in many shards, and taken for a large one that nobody has verified."""
    config = small_config(tmp_path, parallel={"data": 2})
    config = change(config, data={"shard_tokens": 1000})
    monkeypatch.setattr("seqtrain.data.groups.BATCH_BYTES", 500)
    monkeypatch.setattr(verification, "AT_ONCE", 1000)
    corpus = prepare(config.data, progress=False)
    for file in corpus.folder.glob("*.verified"):
        file.unlink()
    return config, corpus


@pytest.mark.all
def test_a_run_on_a_large_corpus_ends_with_what_it_read_verified(large):
    config, corpus = large
    train_on(config)
    assert len(records(config)) == 6
    stamps = verification.Stamps(corpus.train.shards)
    assert all(stamps[number] for number in range(len(corpus.train.shards)))


@pytest.mark.all
def test_damage_ends_a_run_before_its_last_checkpoint(large, monkeypatch):
    config, corpus = large
    name = corpus.train.shards.entry(1).file
    flip(corpus.folder / name)
    # No thread comes to it: only what the ranks do at the end.
    monkeypatch.setattr(verification.Verification, "_run", lambda self: None)
    config = change(config, checkpoint={"every": 0})
    # Of the two ranks one finds it, the other loses its peer; the driver is told of the damage.
    with pytest.raises((DataError, RuntimeError)):
        train_on(config)
    left = json.loads(newest(folder_of(config).epochs).error.read_text())
    assert f"{name}: checksum is" in left["line"]
    assert left["kind"] == "DataError"
    assert not list(folder_of(config).checkpoints.glob("step-*"))


def in_group(rank, file, results):
    """What a rank does where rank 0 prepares for longer than an exchange may take, twice."""
    limit = datetime.timedelta(seconds=2)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=limit)
    ranks, told = this_process(torch.device("cpu")), []
    for number in range(2):
        if ranks.first:
            time.sleep(3)
        told.append(ranks.from_first_in_time(number if ranks.first else None))
    results.put((rank, told))


@pytest.mark.all
def test_ranks_wait_for_the_first_longer_than_an_exchange_may_take(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=in_group, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found == {0: [0, 1], 1: [0, 1]}


def test_evaluation_that_takes_long_is_told(tmp_path, caplog, monkeypatch):
    corpus = prepare(small_config(tmp_path).data, progress=False)
    monkeypatch.setattr(logging.getLogger("seqtrain"), "propagate", True)
    config = small_config(tmp_path, evaluation={"every": 2})
    # 8 rows of 32 tokens a step, and some 4,000 tokens are held out.
    _warn_of_long_evaluation(config, corpus)
    assert "% of the 2 steps between; evaluation.max_tokens=76 takes 5%" in caplog.text
    caplog.clear()
    for quiet in ({"every": 2, "max_tokens": 76}, {"every": 0}, {"every": 6}):
        _warn_of_long_evaluation(change(config, evaluation=quiet), corpus)
    assert not caplog.text
