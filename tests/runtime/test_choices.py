"""What a run's machine chose for it is kept in its records, and every later start takes it over."""

import json
import shutil

import pytest
import torch
import yaml

from seqtrain.kernels import products
from seqtrain.runtime import choices
from seqtrain.runtime.checkpoint import read_manifest
from seqtrain.runtime.resolving import resolve
from seqtrain.runtime.run import run
from tests.runtime.runtime_cases import change, on_ranks, small_config


@pytest.fixture
def probes(monkeypatch):
    """Probes that take no time: what they find, and how often they were asked."""
    found = {"routine": "onednn", "ratio": 3.0, "asked": 0}

    def asked(answer):
        def probe():
            found["asked"] += 1
            return answer()

        probe.cache_info = products.fastest.cache_info
        return probe

    monkeypatch.setattr(products, "fastest", asked(lambda: (found["routine"], 1.2)))
    monkeypatch.setattr(products, "bfloat16_ratio", asked(lambda: found["ratio"]))
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "_chosen", "")
    return found


@pytest.mark.skipif(products.unavailable("onednn") is not None, reason="PyTorch without oneDNN")
def test_a_run_keeps_the_routine_it_began_with(probes, tmp_path, monkeypatch):
    config = small_config(tmp_path, train={"steps": 2}, sample={"tokens": 0})

    def trained(ranks):
        run(config)
        return probes["asked"], products.chosen()

    assert on_ranks(1, trained) == [(1, "onednn")]
    folder = tmp_path / "out"
    assert yaml.safe_load((folder / "config.yaml").read_text())["kernels"]["linear"] == "onednn"
    [*_, last] = sorted((folder / "checkpoints").iterdir())
    assert read_manifest(last).trajectory["kernels"] == {"linear": "onednn"}

    # Another probe would find otherwise: nobody asks it, wherever the run goes on.
    probes["routine"] = "torch"
    assert choices.with_routine(config).kernels.linear == "onednn"
    (folder / "config.yaml").unlink()
    assert choices.with_routine(config).kernels.linear == "onednn"
    shutil.copytree(last, tmp_path / "kept" / last.name)
    shutil.rmtree(folder)
    fork = change(config, checkpoint={"resume": str(tmp_path / "kept" / last.name)})
    assert choices.with_routine(fork).kernels.linear == "onednn"
    assert probes["asked"] == 0
    assert choices.with_routine(config).kernels.linear == "torch"
    assert probes["asked"] == 1


def test_small_products_ask_no_probe(probes, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 1 << 24)
    assert choices.with_routine(small_config(tmp_path)).kernels.linear == "torch"
    assert probes["asked"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is probed")
@pytest.mark.parametrize(("ratio", "dtype"), [(3.0, "bfloat16"), (1.1, "float32"), (0.0, "float32")])
def test_auto_is_bfloat16_where_it_is_faster_and_then_stays(probes, tmp_path, ratio, dtype):
    probes["ratio"] = ratio
    config = small_config(tmp_path, train={"dtype": "auto"})
    assert resolve(config).train.dtype == dtype
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"train": {"dtype": dtype}}))
    probes["ratio"] = 3.0 - ratio
    assert resolve(config).train.dtype == dtype
    assert probes["asked"] == 1
