"""Sharded rows, and how a test compares an operator on them with the operator on the whole row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.parallel import SequenceContext, ShardedSequence, flush_scans


@dataclass(frozen=True)
class Cut:
    """A row of tokens: where ranks and documents begin and end."""

    offsets: tuple[int, ...]
    boundaries: tuple[int, ...] | None

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def ranks(self) -> int:
        return len(self.offsets) - 1

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.boundaries is None else torch.tensor(self.boundaries, dtype=torch.int32)


# Every rank's number of tokens is odd, none is a multiple of a chunk.
CUTS = {
    "one document": Cut((0, 101, 170), None),
    "one packed": Cut((0, 67, 170, 201), (0, 201)),
    "uneven": Cut((0, 67, 90, 201), (0, 5, 40, 83, 84, 84, 150, 201)),
    "starts at a cut": Cut((0, 67, 90, 201), (0, 67, 201)),
    "across three ranks": Cut((0, 67, 90, 143, 201), (0, 13, 160, 201)),
    "empty ranks": Cut((0, 0, 70, 70, 131), (0, 100, 131)),
    "few tokens": Cut((0, 1, 3, 4, 70), (0, 2, 70)),
    "last rank empty": Cut((0, 70, 131, 131), (0, 31, 131)),
}


def cuts(*, quick: str, packed: bool = False) -> list:
    """Parameters of a test for every cut, or every one with documents; all but the `quick` one in the tier `all`."""
    return [
        pytest.param(cut, id=name, marks=() if name == quick else pytest.mark.all)
        for name, cut in CUTS.items()
        if cut.boundaries or not packed
    ]


@dataclass
class OperatorCase:
    """An operator, its tensors for the whole row by name, its options, and which tensors have no time."""

    operator: Callable
    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    initial_state: Tensor | None = None
    shared: tuple[str, ...] = ()

    def leaves(self) -> dict[str, Tensor]:
        named = self.tensors | {"initial_state": self.initial_state}
        return {name: tensor.detach().requires_grad_() for name, tensor in named.items() if tensor is not None}


def whole(case: OperatorCase, cut: Cut, weights: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients from one process: `out`, and a gradient for each tensor of the case."""
    leaves = case.leaves()
    state = leaves.get("initial_state")
    if state is not None and cut.boundaries is not None:
        state = torch.cat([state, state.new_zeros(len(cut.boundaries) - 2, *state.shape[1:])])
    inputs = [leaves.get(name) for name in case.tensors]
    out, final = SequenceContext(cut.cu_seqlens).run(case.operator, *inputs, initial_state=state, **case.options)
    real(out * weights).sum().add(final_loss(final[-1])).backward()
    return {"out": out.detach(), "final": final[-1].detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def sharded(case: OperatorCase, cut: Cut, weights: Tensor, *, members: list[int] | None = None) -> dict[str, Tensor]:
    """The same on this rank: its part of `out`, of the gradients of tensors with time, and its own for the others."""
    group = dist.group.WORLD if members is None else dist.new_group(members)
    assert group is not None
    if members is not None and dist.get_rank() not in members:
        return {}
    rank = group.rank()
    rows = slice(cut.offsets[rank], cut.offsets[rank + 1])
    leaves = case.leaves()
    inputs = [
        leaf if leaf is None or name in case.shared else leaf[:, rows]
        for name, leaf in ((name, leaves.get(name)) for name in case.tensors)
    ]
    sequence = ShardedSequence(group=group, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens)
    out, final = sequence.run(case.operator, *inputs, initial_state=leaves.get("initial_state"), **case.options)
    last = max(r for r in range(cut.ranks) if cut.offsets[r + 1] > cut.offsets[r])
    loss = real(out * weights[:, rows]).sum()
    if rank == last:
        loss = loss + final_loss(final[-1])
    loss.backward()
    flush_scans(group)
    found = {"out": out.detach(), "final": final[-1].detach()}
    for name, leaf in leaves.items():
        timed = name not in (*case.shared, "initial_state")
        found[name] = leaf.grad[:, rows] if timed else leaf.grad
    return found


def joined(found: list[dict[str, Tensor]], case: OperatorCase, cut: Cut) -> dict[str, Tensor]:
    """What all ranks found as one: parts one after the other, gradients of shared tensors added up."""
    last = max(r for r in range(cut.ranks) if cut.offsets[r + 1] > cut.offsets[r])
    result = {"final": found[last]["final"]}
    for name in found[0]:
        if name in (*case.shared, "initial_state"):
            result[name] = torch.stack([part[name] for part in found]).sum(0)
        elif name != "final":
            result[name] = torch.cat([part[name] for part in found], 1)
    return result


def real(x: Tensor) -> Tensor:
    return x.real + x.imag if x.is_complex() else x


def final_loss(state: Tensor) -> Tensor:
    return real(state).sin().sum()
