"""What is trained is handed to the step loop: parameter groups with rates of their own, an objective's own identity."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from seqtrain.errors import CheckpointError
from seqtrain.runtime.engine import parameter_groups, set_learning_rate
from seqtrain.runtime.objective import NothingHeldOut, Pretraining
from seqtrain.runtime.worker import Session, train
from tests.runtime.runtime_cases import losses, on_ranks, outcome, session_for, small_config


def test_a_group_has_its_share_of_the_learning_rate():
    slow, fast, still = (torch.nn.Linear(2, 3) for _ in range(3))
    still.requires_grad_(False)
    groups = parameter_groups([*slow.parameters(), *still.parameters()], 0.1, rate=0.25)
    groups += parameter_groups(fast.parameters(), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.2, 0.2])


@dataclass(frozen=True)
class HalfRate(Pretraining):
    """Pretraining at half the rate, without held-out text; `name` stands for what else an objective may depend on."""

    name: str = "first"

    def trajectory(self):
        return {"half_rate": self.name}

    def work(self, config, corpus):
        work = super().work(config, corpus)
        work.groups[:] = parameter_groups(work.model.parameters(), config.optimizer.weight_decay, rate=0.5)
        return type(work)(work.model, work.groups, work.batches, NothingHeldOut())


def with_objective(config, objective):
    session = session_for(config)
    return Session(session.config, session.corpus, session.name, session.tracking_id, objective)


def test_another_objective_is_trained_by_the_same_loop(tmp_path):
    sizes = {"train": {"steps": 3}, "checkpoint": {"every": 0}}
    slower = small_config(tmp_path, **sizes, optimizer={"lr": 5e-3}, output_dir=str(tmp_path / "slower"))
    halved = small_config(tmp_path, **sizes, output_dir=str(tmp_path / "halved"))
    first = with_objective(halved, HalfRate())
    on_ranks(1, lambda ranks: [train(session, ranks) for session in (session_for(slower), first)])
    assert losses(halved) == losses(slower)
    assert outcome(slower)["held_out_bits_per_byte"] > 0
    assert outcome(halved)["held_out_bits_per_byte"] is None
    # What an objective says decides the numbers is in its checkpoints.
    with pytest.raises(CheckpointError, match="was made with half_rate="):
        on_ranks(1, lambda ranks: train(with_objective(halved, HalfRate("second")), ranks))
