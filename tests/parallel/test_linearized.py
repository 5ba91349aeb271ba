"""Converted layers on a sharded row: window, sinks, delay and memory together give what one rank gives."""

import pytest
import torch
import torch.distributed as dist

from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.parallel import SequenceContext, ShardedSequence
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import boundaries, relative_error

LENGTHS = [21, 3, 40]
OFFSETS = (0, 20, 23, 64)
CASES = [
    ("linearized_attention", {"memory": "gla", "window": 7, "sinks": 2, "query_group": 2, "gate_rank": 3}),
    ("linearized_attention", {"memory": "kda", "window": 25, "sinks": 3}),
    ("linearized_attention", {"memory": "gsa", "window": 0, "slots": 3}),
    ("liger_hgrn2", {"window": 6}),
    ("gsa", {"slots": 3}),
]


def outcome(name, fields, sequence, part):
    """Output and gradients of `part` of a row, by name."""
    torch.manual_seed(4)
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(**fields), LayerShape(16, 2)).double()
    generator = torch.Generator().manual_seed(9)
    x, weight = torch.randn(2, 1, OFFSETS[-1], 16, generator=generator, dtype=torch.float64)[:, :, part]
    x = x.clone().requires_grad_()
    out, _ = mixer(x, sequence=sequence)
    wanted = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()))
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def on_rank(rank, packed):
    cu_seqlens = boundaries(LENGTHS) if packed else None
    sequence = ShardedSequence(group=dist.group.WORLD, offsets=OFFSETS, cu_seqlens=cu_seqlens)
    part = slice(OFFSETS[rank], OFFSETS[rank + 1])
    return [outcome(name, fields, sequence, part) for name, fields in CASES]


@pytest.mark.all
@pytest.mark.parametrize("packed", [True, False])
def test_a_sharded_row_gives_what_the_whole_one_gives(packed):
    found = run_ranks(3, on_rank, packed)
    for number, (name, fields) in enumerate(CASES):
        expected = outcome(name, fields, SequenceContext(boundaries(LENGTHS) if packed else None), slice(None))
        ranks = [rank[number] for rank in found]
        for key, value in expected.items():
            parts = [rank[key] for rank in ranks]
            came = torch.cat(parts, 1) if key in ("out", "x") else torch.stack(parts).sum(0)
            assert relative_error(came, value) < 1e-9, (name, fields, key)
