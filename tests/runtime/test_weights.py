"""`train.weights=bfloat16`: matrices of the model, with float32 masters in the optimizer and in checkpoints."""

from functools import wraps

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.runtime.checks import check
from seqtrain.runtime.task import Callback
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    grid,
    losses,
    saved_weights,
    session_for,
    short_documents,
    small_config,
    train_on,
)

BFLOAT16 = {"weights": "bfloat16", "dtype": "bfloat16"}


# Of deepspeed.comm.
SUMS = ("all_reduce", "reduce", "reduce_scatter_fn")


class Formats(Callback):
    """Asserts them: of weights when training begins, and of what is summed over ranks after that."""

    def begin(self, state):
        from deepspeed import comm

        # In ZeRO 3 pieces are flat.
        weights = [(p, vars(p).get("ds_shape", p.shape)) for p in state.engine.module.parameters()]
        formats = {(len(shape) >= 2, vars(p).get("ds_tensor", p).dtype) for p, shape in weights}
        assert formats == {(True, torch.bfloat16), (False, torch.float32)}
        self.patch, self.summed = pytest.MonkeyPatch(), set()
        for name in SUMS:
            self.patch.setattr(comm, name, self._noting(getattr(comm, name)))

    def _noting(self, function):
        @wraps(function)
        def noting(tensor, *rest, **options):
            if tensor.numel() > 64:
                self.summed.add(tensor.dtype)
            return function(tensor, *rest, **options)

        return noting

    def end(self):
        self.patch.undo()
        assert self.summed == {torch.float32}


@pytest.fixture
def config(tmp_path):
    return small_config(
        tmp_path,
        *("gated_delta_net", "attention"),
        data={"path": short_documents(tmp_path / "short")},
        train={"steps": 6, "sequence_length": 48, **BFLOAT16},
        evaluation={"every": 0, "max_tokens": 96},
        checkpoint={"every": 3, "keep": 3},
        parallel=grid(2, 1, 2),
    )


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.full), *(pytest.param(n, marks=pytest.mark.all) for n in (2, 3))]
)
def test_masters_are_float32_trained_saved_and_resumed(config, stage):
    config = change(config, parallel=grid(2, 1, stage))
    wide = change(config, "wide", train={"weights": "float32"})
    train_on(session_for(config, callback=Formats()), session_for(wide))
    # Products round matrices alike: what differs is the embedding's rows.
    assert losses(config) == pytest.approx(losses(wide), rel=1e-3)
    assert losses(config) != losses(wide)
    saved = saved_weights(config)
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    matrix = saved["blocks.0.mlp.up.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())
    # On the same layout the same bits, on another the same but for rounding.
    again, alone = as_it_was_at(config, 3, "again"), as_it_was_at(config, 3, "alone")
    alone = change(alone, parallel=grid(1, 1, 2))
    train_on(again, alone)
    assert losses(again) == losses(config)
    assert losses(alone) == pytest.approx(losses(config), rel=1e-3)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"dtype": "float32"}}, "set train.dtype=bfloat16, too"),
        ({"parallel": {"zero_stage": 0}}, "use parallel.zero_stage=1 or more"),
    ],
    ids=["products", "stage"],
)
def test_refused(config, sections, said):
    with pytest.raises(ConfigError, match=r"train\.weights=bfloat16: .*" + said):
        check(change(change(config, parallel=grid(1, 1, 2)), **sections))
