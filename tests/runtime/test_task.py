"""What is trained is handed to the step loop: parameter groups with rates of their own, a task's own fingerprint."""

from dataclasses import dataclass

import pytest
import torch

from seqtrain.errors import CheckpointError
from seqtrain.runtime.optimizers import parameter_groups, set_learning_rate
from seqtrain.runtime.task import Pretraining
from tests.runtime.runtime_cases import change, losses, score, session_for, small_config, train_on


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
        found.groups[:] = parameter_groups(found.model.parameters(), config.optimizer.weight_decay, rate=0.5)
        return type(found)(found.model, found.groups, found.batches)


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
