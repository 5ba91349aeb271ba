"""The training loop: exact resume, steps that aren't finite left out, stops, checkpoints that don't fit."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from seqtrain.errors import CheckpointError, SeqtrainError
from seqtrain.models import LanguageModel
from seqtrain.runtime import source, worker
from seqtrain.runtime.checkpoint import find
from seqtrain.runtime.lease import succeed
from seqtrain.runtime.optimizers import OPTIMIZERS, Optimizer
from seqtrain.runtime.run_folder import log_to
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    folder_of,
    losses,
    outcome,
    records,
    score,
    session_for,
    small_config,
    train_on,
)

STAGES = (0, 1, 2, 3)
pytestmark = pytest.mark.all


def resumed_after_three(configs):
    """Those runs resumed from their checkpoints after three steps, as `(whole, resumed)`."""
    again = [as_it_was_at(config, 3, f"{folder_of(config).path.name}-again") for config in configs]
    train_on(*again)
    return zip(configs, again, strict=True)


def on_two_ranks(base, cases):
    return [
        change(base, f"{dtype}-{stage}", train={"dtype": dtype}, parallel={"data": 2, "zero_stage": stage})
        for dtype, stage in cases
    ]


REST = [("float32", 0), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3)]


@pytest.mark.parametrize(
    "cases", [[("float32", 1), ("float32", 3), ("bfloat16", 0)], pytest.param(REST, marks=pytest.mark.full)]
)
def test_a_resumed_run_has_the_very_same_losses(tmp_path, cases):
    whole = on_two_ranks(small_config(tmp_path), cases)
    train_on(*whole)
    for before, after in resumed_after_three(whole):
        assert [record["step"] for record in records(after)] == [1, 2, 3, 4, 5, 6]
        assert losses(after) == losses(before), (before.train.dtype, before.parallel.zero_stage)
        assert score(after) == score(before)


def test_another_optimizer_is_an_entry_in_the_table(tmp_path, monkeypatch):
    adamax = Optimizer(
        options=("betas", "eps"), moments=("exp_avg", "exp_inf"), implementations={"torch": lambda: torch.optim.Adamax}
    )
    monkeypatch.setitem(OPTIMIZERS, "adamax", adamax)
    base = small_config(tmp_path, optimizer={"name": "adamax"})
    whole = [change(base, f"{stage}", parallel={"zero_stage": stage}) for stage in (1, 3)]
    train_on(*whole)
    for before, after in resumed_after_three(whole):
        assert losses(after) == losses(before)
        assert losses(before) == pytest.approx(losses(whole[0]), abs=1e-5)
        assert losses(before)[-1] < losses(before)[0] - 0.1


class Faulty(LanguageModel):
    """One of its passes in training, on one rank, has a loss or a gradient that isn't finite."""

    factor, of_gradient, due, rank = float("nan"), False, (), "0"
    calls = 0

    def forward(self, *arguments, **options):
        loss = super().forward(*arguments, **options)
        self.calls += self.training
        if not self.training or self.calls not in self.due or os.environ["RANK"] != self.rank:
            return loss
        if self.of_gradient:
            loss.register_hook(lambda grad: grad * self.factor)
            return loss
        return loss * self.factor


def break_passes(monkeypatch, **fields) -> None:
    monkeypatch.setattr(source, "LanguageModel", type("Faulty", (Faulty,), fields))


@pytest.mark.parametrize("of_gradient", [False, True])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(tmp_path, monkeypatch, of_gradient):
    break_passes(
        monkeypatch, due=(3,), rank="1", of_gradient=of_gradient, factor=float("inf" if of_gradient else "nan")
    )
    base = small_config(tmp_path, train={"micro_batch_size": 4}, checkpoint={"every": 2})
    configs = on_two_ranks(base, [("float32", 1), ("bfloat16", 0), *(REST[:3] if of_gradient else [("float32", 3)])])
    train_on(*configs)
    for config in configs:
        case = (config.parallel.zero_stage, config.train.dtype)
        skipped = [record["skipped"] for record in records(config)]
        assert skipped == [False, False, True, False, False, False], case
        assert records(config)[2]["grad_norm"] is None
        assert (losses(config)[2] is None) != of_gradient, case
        assert outcome(config)["skipped_steps"] == 1
        assert None not in losses(config)[3:], case
        tolerance = 1e-5 if config.train.dtype == "float32" else 0.05
        assert losses(config)[3:] == pytest.approx(losses(configs[0])[3:], abs=tolerance), case


def test_weights_and_moments_stay_when_a_step_is_skipped(tmp_path, monkeypatch):
    still = small_config(tmp_path, optimizer={"lr": 0.0})
    train_on(still)
    break_passes(monkeypatch, due=(1,), factor=float("inf"))
    base = small_config(tmp_path)
    configs = [change(base, f"{stage}", parallel={"zero_stage": stage}) for stage in STAGES]
    train_on(*configs)
    for config in configs:
        assert losses(config)[0] is None
        assert losses(config)[1] == losses(still)[1], "the second step must see the first weights"
        assert losses(config)[2] != losses(still)[2]
        assert find(folder_of(config).checkpoints).progress.taken == 5


def test_a_run_stops_after_too_many_nonfinite_steps_in_a_row(tmp_path, monkeypatch):
    break_passes(monkeypatch, due=range(1, 100))
    config = small_config(tmp_path, train={"max_nonfinite_steps": 2})
    with pytest.raises(SeqtrainError, match=r"train.max_nonfinite_steps=2: 3 steps in a row, up to step 3"):
        train_on(config)
    assert len(records(config)) == 3


def test_a_stop_during_the_last_evaluation_leaves_the_score_to_the_next_call(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    whole, evaluate = change(config, "whole"), worker.evaluate
    train_on(whole)

    def interrupted(state):
        state.stop.touch()
        return evaluate(state)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "evaluate", interrupted)
        train_on(config)
    assert outcome(config)["stopped"]
    assert score(config) is None
    train_on(config)
    assert not outcome(config)["stopped"]
    assert score(config) == score(whole)
    assert len(records(config)) == 6


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    config = small_config(tmp_path)
    train_on(config)
    session = session_for(change(config, "other", optimizer={"lr": 0.5}))
    folder_of(config).checkpoints.rename(session.folder.checkpoints)
    with pytest.raises(CheckpointError, match=r"step-00000006: was made with optimizer.lr=0.01, now 0.5;"):
        train_on(session)


def test_a_named_checkpoint_starts_a_new_run_with_its_weights_and_step(tmp_path):
    config = small_config(tmp_path)
    train_on(config)
    resume = {"resume": str(folder_of(config).checkpoints / "step-00000006")}
    longer = change(config, "longer", train={"steps": 8}, checkpoint=resume)
    train_on(longer)
    assert [record["step"] for record in records(longer)] == [7, 8]
    assert losses(longer)[0] < losses(config)[0] - 0.1
    wider = change(longer, "wider", model={"width": 32})
    with pytest.raises(CheckpointError, match=r"step-00000006: was made with model.width=16, now 32"):
        train_on(wider)


def test_on_a_full_disk_the_error_itself_is_what_is_seen(tmp_path, monkeypatch, capsys):
    config = small_config(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker, "create_new", full)
    lease = succeed(session_for(config).lease)
    worker.leave_error(lease, 0, ZeroDivisionError("first"), step=3)
    log_to(Path("/dev/full"))
    try:
        logging.getLogger("seqtrain.runtime").info("has no room")
    finally:
        log_to(tmp_path / "run.log")
    assert capsys.readouterr().err == ""
