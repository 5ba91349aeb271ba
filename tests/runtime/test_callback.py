"""A callback sees a rank's phases in order; a profiler on two ranks sees the parts of each, and changes nothing."""

from contextlib import contextmanager

import pytest

from seqtrain.profiling import ProfileConfig, Profiler, read_profiles
from seqtrain.runtime import run
from seqtrain.runtime.callback import Callback
from tests.runtime.runtime_cases import change, losses, on_ranks, small_config


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
