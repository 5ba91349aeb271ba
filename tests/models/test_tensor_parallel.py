"""A model divided over tensor-parallel ranks: the loss and every gradient of the whole one."""

from collections import deque
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqtrain.errors import ConfigError
from seqtrain.initialization import materialize
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.divided import Divided, divide
from seqtrain.models.shared import SharedConfig
from seqtrain.parallel import SequenceContext
from seqtrain.parallel.tensor import TensorParallel, sum_gradients
from seqtrain.parallel.testing import run_ranks
from tests.models.test_sequence_parallel import on_whole_row
from tests.models.tiny import LAYERS, TINY, assert_same_gradients, build, row
from tests.parallel.shard_cases import Cut

CUT = Cut((0, 100, 201), (0, 13, 14, 160, 201))


def divided(whole: LanguageModel, group: dist.ProcessGroup) -> Divided:
    """This rank's part of `whole`, with its numbers."""
    found = divide(whole, TensorParallel(group.rank(), group.size(), group))
    weights = dict(whole.named_parameters()) | dict(whole.named_buffers())

    def fill(name: str, tensor: torch.Tensor, own: slice) -> None:
        tensor.copy_(weights[name])

    parts = {"whole_shape": found.whole_shape, "cut": found.own}
    deque(materialize(found.model, fill, torch.device("cpu"), **parts), maxlen=0)
    sum_gradients(found.shared, group)
    return found


def joined(part: Divided, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """The whole weight's gradient."""
    parts: list[Any] = [None] * part.tensor.count
    dist.all_gather_object(parts, gradient, group=part.tensor.group)
    if name in part.divisions:
        return part.divisions[name].whole(parts)
    # No rank may drift away from the others.
    assert all(torch.equal(each, parts[0]) for each in parts), name
    return parts[0]


def on_rank(layers: tuple[str, ...], **fields: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    part = divided(build(layers, **fields), dist.group.WORLD)
    loss = part.model(*row(CUT), sequence=SequenceContext(CUT.cu_seqlens))
    loss.backward()
    return loss.detach(), {name: joined(part, name, weight.grad) for name, weight in part.model.named_parameters()}


def assert_same(ranks: int, cases: dict[str, tuple[tuple[str, ...], dict[str, Any]]]) -> None:
    truth = {name: on_whole_row(layers, CUT, **fields) for name, (layers, fields) in cases.items()}
    found = run_ranks(
        ranks, lambda rank: {name: on_rank(layers, **fields) for name, (layers, fields) in cases.items()}, limit=200
    )
    for each in found:
        for name in cases:
            assert_same_gradients(each[name], truth[name], what=name)


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_every_mixer(part):
    assert_same(2, {name: (LAYERS[name], {}) for name in list(LAYERS)[part::4]})


WIDE = {"heads": 4, "width": 32}
SETTINGS = {
    **TINY,
    "attention": {"query_group": 4, "qkv_bias": True, "out_bias": True, "qk_norm": True},
    "sliding_attention": {"query_group": 2, "window": 20, "qk_norm": True, "qk_norm_over": "all", "output_gate": True},
    "mamba2": {"state": 8, "groups": 2, "in_bias": True, "out_bias": True},
    "liger_gla": {"query_group": 4, "window": 9},
}
OTHERS = {
    "key heads that ranks share": (("attention", "sliding_attention", "mamba2", "liger_gla"), {"settings": SETTINGS}),
    "biases, caps": (("gla", "tcnca"), {"mlp_bias": True, "tie_embeddings": False, "logit_cap": 5.0}),
    "experts": (("gla",), {"experts": 4, "expert_width": 12, "shared_expert_width": 8, "expert_latent": 8}),
    "shared blocks": (("gla",), {"shared": SharedConfig((1,), adapter_rank=3)}),
    "recomputed parts": (("gated_delta_net", "hgrn"), {"recompute": ("norm", "mlp", "projection")}),
    "recomputed blocks": (("mamba",), {"recompute": ("block",), "norms": ("both",)}),
}


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.all), pytest.param(4, marks=pytest.mark.full)])
def test_what_layers_can_have_besides(ranks):
    assert_same(ranks, {name: (layers, WIDE | fields) for name, (layers, fields) in OTHERS.items()})


@pytest.mark.parametrize(
    "cases",
    [[("gated_delta_net", "mamba2")], pytest.param(LAYERS.values(), marks=pytest.mark.full)],
    ids=["two", "all"],
)
def test_parts_make_the_whole(cases):
    for layers in cases:
        with torch.device("meta"):
            whole = LanguageModel(ModelConfig(layers=layers, depth=len(layers), **WIDE), {}, 41)
        parts = [divide(whole, TensorParallel(rank, 2)) for rank in range(2)]
        for name, weight in whole.named_parameters():
            if (division := parts[0].divisions.get(name)) is None:
                continue
            numbers = torch.arange(weight.numel()).view(weight.shape)
            pieces = [division.own(numbers, rank, 2) for rank in range(2)]
            assert torch.equal(division.whole(pieces), numbers), name
            assert [piece.shape for piece in pieces] == [dict(p.model.named_parameters())[name].shape for p in parts]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3, "width": 24}, "model.heads=3: can't be divided by parallel.tensor=2; use parallel.tensor=1"),
        ({"mlp_width": 33}, "model.mlp_width=33: can't be divided by parallel.tensor=2"),
    ],
)
def test_what_can_not_be_divided_is_named(fields, message):
    with torch.device("meta"):
        whole = LanguageModel(ModelConfig(layers=("gla",), depth=1, **{**WIDE, **fields}), {}, 40)
    with pytest.raises(ConfigError, match=message):
        divide(whole, TensorParallel(0, 2))
