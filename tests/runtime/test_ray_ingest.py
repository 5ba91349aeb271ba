"""Ray tasks make of text the files that this process makes."""

import sys
from dataclasses import replace

import pytest

from seqtrain.data import prepare
from seqtrain.files import sha256_of
from seqtrain.runtime.ray_ingest import ray_pools
from seqtrain.runtime.ray_launcher import start_ray
from tests.data.test_sections import large_text
from tests.runtime.runtime_cases import change, small_config


def files(cache):
    (folder,) = [entry for entry in cache.iterdir() if entry.is_dir()]
    return {file.name: sha256_of(file) for file in folder.iterdir() if file.suffix != ".verified"}


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_tasks_of_a_cluster_make_the_same_files(tmp_path):
    path = large_text(tmp_path / "large.jsonl", 200 * 10**6)
    config = small_config(tmp_path)
    data = replace(config.data, source="jsonl", path=str(path), cache_dir=str(tmp_path / "one"), workers=1)
    prepare(data, progress=False)
    start_ray(replace(config, runtime=replace(config.runtime, name="ray")))
    try:
        cluster = replace(config, runtime=replace(config.runtime, name="ray", address="auto"))
        beside = replace(data, cache_dir=str(tmp_path / "tasks"), workers=2)
        prepare(beside, progress=False, pools=ray_pools(replace(cluster, data=beside)))
    finally:
        sys.modules["ray"].shutdown()
    assert len(files(tmp_path / "one")) > 40
    assert files(tmp_path / "tasks") == files(tmp_path / "one")


def test_only_runs_on_a_cluster_use_its_tasks(tmp_path):
    config = small_config(tmp_path)
    assert ray_pools(config) is None
    assert ray_pools(change(config, runtime={"name": "ray"})) is None
    assert ray_pools(change(config, runtime={"name": "ray", "address": "auto"})) is not None
