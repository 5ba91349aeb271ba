"""`train.compile`: the losses of a run that isn't compiled, names of weights as ever, one graph for all documents."""

import pytest
import torch
from torch import nn

from seqtrain.errors import ConfigError
from seqtrain.runtime.checks import check
from seqtrain.runtime.worker import train
from tests.runtime.runtime_cases import (
    change,
    grid,
    losses,
    on_ranks,
    saved_weights,
    session_for,
    short_documents,
    small_config,
)

LAYERS = ("gated_delta_net", "attention")


def names(config):
    return sorted(saved_weights(config))


def trained(config, backend):
    """The number of graphs that were made on rank 0."""
    session = session_for(config)

    def work(ranks):
        # What tests before compiled in this process.
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_ = nn.Module.compile
        nn.Module.compile = lambda self: compile_(self, backend=backend)
        train(session, ranks)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if config.train.compile else 0

    found = on_ranks(config.parallel.ranks, work)[0]
    session.lease.release()
    return found


@pytest.mark.parametrize(
    ("how", "backend", "ranks"),
    [
        pytest.param("regions", "aot_eager", 1, marks=pytest.mark.all),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [(True, "aot_eager", 1), ("regions", "aot_eager", 2)]
        ),
    ],
)
def test_same_losses(tmp_path, how, backend, ranks):
    base = small_config(
        tmp_path,
        *LAYERS,
        data={"path": short_documents(tmp_path / "short")},
        train={"steps": 6, "sequence_length": 48},
        evaluation={"every": 0, "max_tokens": 96},
        parallel=grid(1, ranks, 1),
    )
    compiled = change(base, "compiled", train={"compile": how})
    trained(base, backend)
    graphs = trained(compiled, backend)
    assert losses(compiled) == pytest.approx(losses(base), abs=1e-5)
    assert names(compiled) == names(base)
    # Every region once with gradients and once without, however many documents.
    assert 0 < graphs <= (2 if how is True else 2 * len(LAYERS))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"recompute": ("norm",)}}, r"can't compile model\.recompute=\[norm\]"),
        ({"parallel": {"zero_stage": 3}}, r"parallel\.zero_stage=3; use parallel\.zero_stage=2 or less"),
        ({"model": {"experts": 2}}, "use train.compile=regions"),
    ],
    ids=["recompute", "stage 3", "experts"],
)
def test_refused(tmp_path, sections, said):
    with pytest.raises(ConfigError, match=r"train\.compile=true: .*" + said):
        check(change(small_config(tmp_path, train={"compile": True}), **sections))
