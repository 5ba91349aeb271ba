"""Ranks of a node share Triton's compiled kernels, in a folder of their node's that is the user's alone."""

import multiprocessing
import tempfile
from types import SimpleNamespace

import pytest

from seqtrain.kernels import node_cache
from seqtrain.kernels.node_cache import Turns, share

fork = multiprocessing.get_context("fork")
knobs = pytest.importorskip("triton").knobs


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in node_cache.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(knobs.runtime, name, None)
    return tmp_path


@pytest.mark.all
def test_only_many_nodes_have_a_folder_each_and_the_users_choice_stays(temporary, monkeypatch, caplog):
    default = knobs.cache.dir
    share(nodes=1)
    assert knobs.cache.dir == default
    share(nodes=2)
    [folder] = temporary.iterdir()
    assert knobs.cache.dir == str(folder / "cache")
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    share(nodes=2)
    assert knobs.cache.dir == "/chosen"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    folder.chmod(0o777)
    share(nodes=2)
    assert knobs.cache.dir == default
    assert "is not this user's alone" in caplog.text


@pytest.mark.all
def test_a_kernel_is_compiled_by_one_process_of_a_node(tmp_path):
    """Six come to each of two kernels at once; as Triton does, they look into the cache between the two calls."""
    told = {"repr": "kernel(fp32)", "fn": SimpleNamespace(module="m", name="kernel")}

    def come(number: int, start) -> None:
        turns, key = Turns(tmp_path / "locks"), ("fp32", number % 2)
        cached, compiled = tmp_path / f"{number % 2}.cubin", tmp_path / f"{number}.compiled"
        start.wait()
        assert turns.wait(key=key, **told | {"repr": str(key)}) is False
        if not cached.exists():
            compiled.touch()
            cached.touch()
        turns.done(key=key, **told)

    start = fork.Barrier(12)
    processes = [fork.Process(target=come, args=(number, start)) for number in range(12)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 12
    assert len(list(tmp_path.glob("*.compiled"))) == 2
