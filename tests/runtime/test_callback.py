"""A callback sees phases in order and changes nothing; what is trained is handed to the step loop."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from seqtrain.errors import CheckpointError
from seqtrain.profiling import ProfileConfig, Profiler, read_profiles
from seqtrain.runtime import run
from seqtrain.runtime.optimizers import parameter_groups, set_learning_rate
from seqtrain.runtime.task import Callback, Pretraining
from tests.runtime.runtime_cases import change, losses, on_ranks, score, session_for, small_config, train_on


class Notes(Callback):
    """Writes down what it is told."""

    def __init__(self):
        self.seen = []

    def begin(self, state):
        self.seen.append(f"begin at {state.progress.step}")

    @contextmanager
    def phase(self, name):
        self.seen.append(name)
        yield
        self.seen.append(f"/{name}")

    def end(self):
        self.seen.append("end")


def watched(ranks, config):
    notes = Notes()
    run(config, callback=notes)
    return notes.seen


def test_the_phases_of_a_run_come_in_order(tmp_path):
    config = small_config(
        tmp_path, train={"steps": 2, "batch_size": 2}, evaluation={"max_tokens": 64}, checkpoint={"every": 1}
    )
    [seen] = on_ranks(1, watched, config)
    step, save = ["step", "data", "/data", "/step"], ["checkpoint", "/checkpoint"]
    assert seen == ["begin at 0", *step, *save, *step, "evaluation", "/evaluation", *save, "end"]


def run_both(ranks, watched, settings, path, unwatched):
    run(watched, callback=Profiler(settings, path))
    run(unwatched)


@pytest.mark.all
def test_two_ranks_of_one_sequence_tell_their_own_parts_and_lose_nothing(tmp_path):
    settings = ProfileConfig(steps=1, warmup=1, peak=0.0, trace=True)
    config = small_config(
        tmp_path,
        train={"steps": settings.total_steps, "batch_size": 4},
        parallel={"sequence": 2, "zero_stage": 1},
        model={"activation_checkpointing": True},
        evaluation={"max_tokens": 32},
        sample={"tokens": 0},
    )
    unwatched = change(config, "unwatched")
    on_ranks(2, run_both, config, settings, tmp_path / "ranks.json", unwatched)
    ranks = read_profiles(tmp_path / "ranks.json")
    assert [rank["rank"] for rank in ranks] == [0, 1]
    modules = {(name, phase) for name in ("linear_attention", "mlp") for phase in ("recomputation", "backward")}
    for rank in ranks:
        found = {(part["kind"], part["phase"]) for part in rank["parts"]}
        assert found >= modules | {("communication", "scan"), ("communication", "collective")}
        assert [len(rank["steps"][kind]) for kind in ("warm-up", "plain", "profiled", "memory")] == [1] * 4
        assert len(rank["phases"]["checkpoint"]) >= 1
        # A scan a layer, micro-batch and direction.
        assert len(rank["in_flight"]) == 2 * 2 * 2
    assert losses(unwatched) == losses(config)


def test_a_group_has_its_share_of_the_learning_rate():
    slow, fast, still = (torch.nn.Linear(2, 3) for _ in range(3))
    still.requires_grad_(False)
    groups = parameter_groups([*slow.parameters(), *still.parameters()], 0.1, rate=0.25)
    groups += parameter_groups(fast.parameters(), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(optimizer.param_groups, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.2, 0.2])


@dataclass(frozen=True)
class HalfRate(Pretraining):
    """Pretraining at half the rate, without held-out text; `name` stands for what else a task may depend on."""

    name: str = "first"

    def fingerprint(self):
        return {"half_rate": self.name}

    def build(self, config, corpus):
        found = super().build(config, corpus)
        groups = parameter_groups(found.model.parameters(), config.optimizer.weight_decay, rate=0.5)
        return replace(found, groups=groups, held_out=None)


@pytest.mark.all
def test_another_task_is_trained_by_the_same_loop(tmp_path):
    halved = small_config(tmp_path, train={"steps": 3}, checkpoint={"every": 0})
    slower = change(halved, "slower", optimizer={"lr": 5e-3})
    train_on(slower, session_for(halved, task=HalfRate()))
    assert losses(halved) == losses(slower)
    assert score(slower) > 0
    assert score(halved) is None
    # What a task says decides the numbers is in its checkpoints.
    with pytest.raises(CheckpointError, match="was made with half_rate="):
        train_on(session_for(halved, task=HalfRate("second")))
