"""How a mixer begins in the place of softmax attention: with that layer's own projections (arXiv 2408.15237).

A mixer that can says by `Mixer.projections` which rows of its matrices stand for q, k, v and out.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

# The matrix's name and its rows, of q, k and v; `out` is a matrix whole.
Projections = Mapping[str, tuple[str, slice]]
# Gates forget by so much less than those of models trained from scratch: the far past is what a memory is for.
SLOWER = 16.0


def fused_projections(path: str, sizes: Iterable[int], names: str = "qkv", first: int = 0) -> Projections:
    """Where the rows of the matrix `path` are those of `names`, one after the other from row `first` on."""
    rows = zip(names, pairwise(accumulate(sizes, initial=first)), strict=True)
    return {name: (path, slice(*own)) for name, own in rows} | {"out": ("out.weight", slice(None))}


@torch.no_grad()
def copy_projections(mixer: Any, attention: Any) -> None:
    """Gives `mixer` the attention's q, k, v and out, head by head.

    A key head of attention stands in several places where more heads of the mixer use it. Where each head of attention
    has several of the mixer's, these share what goes out.
    """
    key, mine = attention.key, mixer.projections()
    for name in ("q", "k", "v"):
        path, rows = mine[name]
        target = heads_of(mixer.get_parameter(path)[rows], key)
        given = heads_of(rows_of(attention, name), key)
        target.copy_(repeated(given, len(target)))
    given = attention.out.weight.unflatten(1, (-1, key))  # D H K
    target = mixer.out.weight.unflatten(1, (-1, key))
    times = target.shape[1] // given.shape[1]
    target.copy_(given.repeat_interleave(times, 1) / times)


def rows_of(attention: Any, name: str, kind: str = "weight") -> Tensor:
    """The rows of the attention's q, k or v: its weight or its bias."""
    path, rows = attention.projections()[name]
    found: Tensor = attention.get_parameter(f"{path.rpartition('.')[0]}.{kind}")[rows]
    return found


def heads_of(rows: Tensor, key: int) -> Tensor:
    """`[heads * key, ...]` by head."""
    return rows.unflatten(0, (-1, key))


def repeated(heads: Tensor, count: int) -> Tensor:
    """Each of the heads `[G,...]` for those of `count` that use it, one after the other."""
    assert count % len(heads) == 0, (count, len(heads))
    return heads.repeat_interleave(count // len(heads), 0)


@torch.no_grad()
def gate_rows(attention: Any, heads: int) -> Tensor:
    """What an output gate begins as: the mean of the output's transpose and the values, for `heads` heads `[.,D]`.

    Better than random numbers: AWS's Hybrid Model Factory, stage 0 of its priming.
    """
    out = heads_of(attention.out.weight.T, attention.key)
    values = heads_of(rows_of(attention, "v"), attention.key)
    return (repeated(out, heads) + repeated(values, heads)).flatten(0, 1) / 2


@torch.no_grad()
def pass_on(conv: nn.Module, attention: Any, sizes: Mapping[str, int]) -> None:
    """Makes a short convolution hand on each token itself, plus the attention's biases of q, k or v (by `sizes`)."""
    weight, bias = conv.get_parameter("weight"), getattr(conv, "bias", None)
    weight.zero_()
    weight[:, -1] = 1.0
    if bias is not None:
        bias.zero_()
        if attention.qkv.bias is not None:
            for part, name in zip(bias.split([*sizes.values()]), sizes, strict=True):
                given = heads_of(rows_of(attention, name, "bias"), attention.key)
                part.copy_(repeated(given, len(part) // attention.key).flatten())


@torch.no_grad()
def forget_slowly(rate_log: Tensor) -> None:
    """Divides the rates whose logarithms these are."""
    rate_log.sub_(torch.tensor(SLOWER).log().to(rate_log))
