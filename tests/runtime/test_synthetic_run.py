"""Runs on a synthetic task: scored by accuracy on rows of its own, alike however many ranks share the work."""

import pytest
import torch

from seqtrain.data import DataConfig
from seqtrain.runtime.checks import check
from seqtrain.runtime.evaluation import _score_answers
from tests.command_cases import refused
from tests.runtime.runtime_cases import change, outcome, records, small_config, train_on


def on_parity(root, *, output="out", **sections):
    return small_config(
        root,
        data=DataConfig(source="parity", held_out_rows=12),
        train={"steps": 3, "sequence_length": 16},
        evaluation={"every": 1},
        output_dir=str(root / output),
        **sections,
    )


@pytest.mark.all
def test_accuracy_and_loss_are_recorded_and_don_t_depend_on_the_ranks(tmp_path):
    alone = on_parity(tmp_path, output="one")
    split = on_parity(tmp_path, output="four", parallel={"data": 2, "sequence": 2})
    train_on(alone, split)
    for one, four in zip(records(alone), records(split), strict=True):
        assert 0 < one["held_out_accuracy"] <= 1
        for key in ("loss", "held_out_loss", "held_out_accuracy"):
            assert four[key] == pytest.approx(one[key], abs=1e-5)
        assert "held_out_bits_per_byte" not in one
    end = outcome(alone)
    assert end["held_out_bits_per_byte"] is None
    assert end["held_out_accuracy"] == records(alone)[-1]["held_out_accuracy"]


def test_answers_are_counted_where_they_are_asked():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 9.0]]])
    nats, right, asked = _score_answers(logits, torch.tensor([[0, 0, 0, -100]]))
    assert (right, asked) == (2, 3)
    low, high = torch.log_softmax(torch.tensor([0.0, 2.0]), 0).tolist()
    assert nats == pytest.approx(-(2 * high + low))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "mqar"}, "train.sequence_length=16: data.source=mqar with these data.task settings needs at least"),
        ({"source": "parity", "task": {"bits": 2}}, "config key 'data.task.bits' is unknown"),
        ({"source": "mqra"}, "data.source 'mqra' is unknown; did you mean 'mqar'? Known: chat, "),
        ({"source": "stdlib", "task": {"pairs": 2}}, "data.task.pairs: data.source=stdlib is text, not a task"),
        ({"source": "parity", "packing": "best_fit"}, "data.packing=best_fit: data.source=parity is a task"),
        ({"documents_per_row": 2}, "data.documents_per_row=2: data.packing=stream has no use for it"),
        ({"source": "chat", "train_roles": ["bot"]}, "data.train_roles=['bot']: takes one or more of system"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_before_anything_starts(tmp_path, data, message):
    with refused(message):
        check(change(on_parity(tmp_path), data=DataConfig(**data)))
