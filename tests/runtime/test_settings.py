"""Rules between keys: each broken one is one line that names the key and a way out; the learning rate at every step."""

import itertools
import math
import os
import subprocess
import sys

import pytest

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.runtime import check
from seqtrain.runtime.resolving import resolve
from seqtrain.runtime.resume import check_fits, fingerprint
from seqtrain.runtime.run_folder import plain
from seqtrain.runtime.schedule import ScheduleConfig, learning_rate
from seqtrain.runtime.settings import micro_batch
from tests.runtime.runtime_cases import small_config

RAY = {"name": "ray"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"runtime": RAY, "parallel": {"sequence": 33}}, "parallel.sequence=33: .*sequence_length=32 .* use 32 or"),
        ({"runtime": RAY, "parallel": {"data": 3, "sequence": 2}}, "train.batch_size=8: .*parallel.data=3; use 9"),
        ({"train": {"batch_size": 6, "micro_batch_size": 4}}, "train.batch_size=6: .* multiple of .* 1 x 4; use 8"),
        ({"parallel": {"data": 2}}, "parallel.data=2 .*: runtime=inline .* use parallel.data=1, runtime=ray"),
        ({"parallel": {"sequence": 2}}, "parallel.sequence=2: .* use .* parallel.sequence=1, .*--nproc-per-node=2"),
        ({"runtime": RAY | {"address": "10.0.0.7:6379"}}, "runtime.address=10.0.0.7:6379: .*RAY_AUTH_MODE=token"),
        (
            {"model": {"groups": (8,), "layers": ("tcnca",)}},
            r"model.groups=\[8\]: layer 0, tcnca, has groups of its own",
        ),
        ({"model": {"width": 10**8}}, "model.depth=2 model.width=100000000: the weights alone are .* any has, 1.0e"),
        ({"checkpoint": {"resume": ""}}, "checkpoint.resume=: is empty; use auto, never, or the folder"),
        ({"model": {"width": 10**15}}, "model.width=1000000000000000: a block can't be made"),
        ({"runtime": RAY, "parallel": {"data": 2, "experts": 2}}, "parallel.experts=2: .*no routed experts; use .*=1"),
        (
            {"runtime": RAY, "parallel": {"data": 4, "experts": 4}, "model": {"experts": 6}},
            "parallel.experts=4: must divide model.experts=6; use 2",
        ),
        (
            {"runtime": RAY, "parallel": {"data": 2, "experts": 2, "zero_stage": 3}, "model": {"experts": 6}},
            "parallel.experts=2: .*parallel.zero_stage=3; use parallel.zero_stage=2 or less",
        ),
        (
            {"data": {"carry_rows": 3}, "train": {"batch_size": 8, "micro_batch_size": 4}},
            "data.carry_rows=3: must divide the 4 rows .* use train.micro_batch_size=3",
        ),
        ({"train": {"batch_size": 10**9}}, r"train.batch_size=1000000000: with .* has 3.2e\+10 tokens; at most"),
    ],
)
def test_a_broken_rule_names_the_key_and_the_way_out(tmp_path, monkeypatch, sections, message):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check(small_config(tmp_path))
    with pytest.raises(ConfigError, match=message) as error:
        check(small_config(tmp_path, **sections))
    assert "\n" not in str(error.value)


def test_inline_takes_the_ranks_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(small_config(tmp_path, parallel={"data": 2}))
    check(small_config(tmp_path, parallel={"sequence": 2}))
    with pytest.raises(ConfigError, match=r"parallel.data=1 .*torchrun started 2; use parallel.data=2"):
        check(small_config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"parallel.data=6 parallel.sequence=3: .* use parallel.data=2, .*=18"):
        check(small_config(tmp_path, parallel={"data": 6, "sequence": 3}, train={"batch_size": 12}))


def test_a_batch_is_divided_over_the_data_ranks_alone_and_may_be_smaller_than_a_micro_batch(tmp_path):
    sizes = {"batch_size": 4, "micro_batch_size": 8}
    config = small_config(tmp_path, runtime=RAY, parallel={"data": 2, "sequence": 3}, train=sizes)
    alone = small_config(tmp_path, train=sizes)
    for each in (config, alone):
        check(each)
    assert config.parallel.ranks == 6
    assert (micro_batch(config), micro_batch(alone)) == (2, 4)


def test_a_cluster_on_this_machine_or_with_a_token_is_allowed(tmp_path, monkeypatch):
    check(small_config(tmp_path, runtime=RAY | {"address": "127.0.0.1:6379"}))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check(small_config(tmp_path, runtime=RAY | {"address": "10.0.0.7:6379"}))


def test_auto_becomes_a_number_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    auto = {"parallel": {"data": "auto"}, "train": {"micro_batch_size": "auto"}, "runtime": {"cpus_per_worker": "auto"}}
    config = resolve(small_config(tmp_path, **auto | {"runtime": {"name": "ray", "cpus_per_worker": "auto"}}))
    assert (config.parallel.data, config.train.micro_batch_size, config.runtime.cpus_per_worker) == (2, 4, 3)
    assert resolve(config) == config
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve(small_config(tmp_path, **auto)).parallel.data == 4
    with pytest.raises(ConfigError, match=r"runtime.address=127.0.0.1:9: no Ray cluster answers: .*refused"):
        resolve(small_config(tmp_path, **auto | {"runtime": {"name": "ray", "address": "127.0.0.1:9"}}))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers"):
        resolve(small_config(tmp_path, **auto | {"runtime": {"name": "ray"}}))
    monkeypatch.delenv("RAY_ADDRESS")


def test_only_a_schedule_with_a_decay_is_told_apart_by_it(tmp_path):
    def differ(name):
        now, before = (small_config(tmp_path, schedule={"name": name, "decay_fraction": share}) for share in (0.2, 0.0))
        check_fits(tmp_path, fingerprint(now) | {"schedule": plain(before.schedule)}, fingerprint(now))

    differ("cosine")
    with pytest.raises(CheckpointError, match=r"schedule.decay_fraction=0.0, now 0.2"):
        differ("wsd")


@pytest.mark.all
def test_checking_a_config_imports_nothing_that_compiles_and_starts_no_pool_of_threads():
    """A pool would not be in the child that `runtime=ray` forks, and hang there."""
    code = """
import sys
from seqtrain.config import compose_config
from seqtrain.runtime import guard, read_pretrain_config
read_pretrain_config(compose_config("pretrain"))
assert guard._native_threads() == guard.AT_IMPORT
heavy = ("torch._dynamo", "deepspeed", "ray", "transformers", "matplotlib")
print([name for name in heavy if name in sys.modules])
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""
    several = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=several)
    assert result.stdout.splitlines() == ["[]", "2.0"]


STEPS = 40


def rates(**values) -> list[float]:
    schedule = ScheduleConfig(**values)
    return [learning_rate(schedule, peak=2.0, steps=STEPS, step=step) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_rises_to_the_peak_and_falls_to_the_final_rate(name, warmup):
    found = rates(name=name, warmup_fraction=warmup / STEPS, final_lr_ratio=0.25)
    assert found[:warmup] == pytest.approx([2.0 * (step + 1) / warmup for step in range(warmup)])
    assert found[-1] == pytest.approx(0.5)
    after = found[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert max(found) <= 2.0
    assert min(found) > 0


def test_cosine_follows_the_formula():
    found = rates(name="cosine", warmup_fraction=0.1, final_lr_ratio=0.0)
    for step in range(4, STEPS):
        share = (step - 3) / (STEPS - 4)
        assert found[step] == pytest.approx(1 + math.cos(math.pi * share))


def test_wsd_is_constant_between_warm_up_and_decay():
    found = rates(name="wsd", warmup_fraction=0.125, decay_fraction=0.25, final_lr_ratio=0.0)
    assert set(found[4:30]) == {2.0}
    assert found[30:] == pytest.approx([2.0 * (9 - index) / 10 for index in range(10)])


@pytest.mark.parametrize("name", ["linear", "wsd"])
def test_a_run_that_is_all_warm_up_ends_at_the_peak(name):
    assert rates(name=name, warmup_fraction=1.0)[-1] == 2.0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: is no number of ranks"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: is no number of ranks"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: is no number of ranks"),
        ({"RANK": "0"}, "WORLD_SIZE: isn't set, but RANK=0 is; start ranks with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: isn't set, but RANK=0 is"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT: isn't set"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK=2: must be below WORLD_SIZE=2",
        ),
    ],
)
def test_an_environment_that_is_not_torchrun_s_is_one_line(tmp_path, environment, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check(small_config(tmp_path))
