"""Sharded rows, and how a test compares an operator on them with the operator on the whole row."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels import softmax_attention
from seqtrain.parallel import SequenceContext, ShardedSequence, flush_scans
from seqtrain.parallel.testing import run_ranks


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
    def last_rank(self) -> int:
        """The last one that has tokens."""
        return max(rank for rank in range(self.ranks) if self.offsets[rank + 1] > self.offsets[rank])

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
    """An operator, its tensors for the whole row by name, its options, and which tensors have no time.

    `initial_state` is that of the row, or of each row of a batch; `final`: whether the state after it is compared.
    """

    operator: Callable
    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    initial_state: Tensor | dict[str, Tensor] | None = None
    shared: tuple[str, ...] = ()
    final: bool = True
    backend: str = "auto"

    def leaves(self) -> dict[str, Tensor]:
        named = self.tensors | by_name("past", self.initial_state)
        return {
            name: tensor.detach().requires_grad_(tensor.dtype != torch.int64)
            for name, tensor in named.items()
            if tensor is not None
        }

    def state_of(self, leaves: dict[str, Tensor], more: int = 0) -> Tensor | dict[str, Tensor] | None:
        """The initial state among `leaves`, with `more` empty ones after it."""
        past = {name: leaf for name, leaf in leaves.items() if name.startswith("past")}
        # The keys of softmax attention's documents lie end to end.
        rows = {name: x for name, x in past.items() if self.operator is not softmax_attention or x.dim() == 1}
        past |= {name: torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for name, x in rows.items()}
        return past.get("past", {name.removeprefix("past "): x for name, x in past.items()} or None)

    def weights(self) -> Tensor:
        """What a loss multiplies the outputs by."""
        first = next(iter(self.tensors.values()))
        options = {name: value for name, value in self.options.items() if name != "form"}
        shape = self.operator.out_shape(list(self.tensors.values()), options)
        return torch.randn(shape, dtype=first.real.dtype, generator=torch.Generator())


def by_name(name: str, state: Tensor | dict[str, Tensor] | None) -> dict[str, Tensor]:
    if isinstance(state, dict):
        return {f"{name} {key}": x for key, x in state.items()}
    return {} if state is None else {name: state}


def outcome(leaves: dict[str, Tensor], out: Tensor, final: Any, weights: Tensor, last: bool) -> dict:
    """`out`, the `final` state of the row, and gradients of a loss on both, of the state on the `last` rank alone."""
    loss = real(out * weights).sum()
    final = {name: x[-len(out) :] for name, x in by_name("final", final).items()}
    if last:
        loss = loss + sum(real(x).sin().sum() for x in final.values() if x.requires_grad)
    loss.backward()
    found = {"out": out} | final
    return {name: x.detach() for name, x in found.items()} | {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if leaf.requires_grad
    }


def whole(case: OperatorCase, cut: Cut) -> dict[str, Tensor]:
    """Outputs and gradients from one process: `out`, and a gradient for each tensor of the case."""
    leaves = case.leaves()
    # The initial state is the first document's.
    state = case.state_of(leaves, 0 if cut.boundaries is None else len(cut.boundaries) - 2)
    inputs = [leaves.get(name) for name in case.tensors]
    options = {name: value for name, value in case.options.items() if name != "form"}
    out, final = SequenceContext(cut.cu_seqlens).run(case.operator, *inputs, initial_state=state, **options)
    return outcome(leaves, out, final if case.final else None, case.weights(), True)


def sharded(case: OperatorCase, cut: Cut, *, members: list[int] | None = None) -> dict[str, Tensor]:
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
    sequence = ShardedSequence(group=group, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens, backend=case.backend)
    out, final = sequence.run(case.operator, *inputs, initial_state=case.state_of(leaves), **case.options)
    final = final if case.final else None
    found = outcome(leaves, out, final, case.weights()[:, rows], rank == cut.last_rank)
    flush_scans(group)
    timed = case.tensors.keys() - set(case.shared)
    return {name: x[:, rows] if name in timed else x for name, x in found.items()}


def joined(found: list[dict[str, Tensor]], case: OperatorCase, cut: Cut) -> dict[str, Tensor]:
    """What all ranks found as one: parts one after the other, gradients of shared tensors added up."""
    result = {}
    for name in found[0]:
        parts = [part[name] for part in found]
        if name.startswith("final"):
            result[name] = parts[cut.last_rank]
        elif name in case.shared or name.startswith("past"):
            result[name] = torch.stack(parts).sum(0)
        else:
            result[name] = torch.cat(parts, 1)
    return result


def assert_same_as_whole(cases: dict[str, OperatorCase], cut: Cut, **options: Any) -> None:
    assert_same_rows({name: (case, cut) for name, case in cases.items()}, **options)


def assert_same_rows(
    rows: dict[str, tuple[OperatorCase, Cut]], *, limit: float = 1e-10, members: list[int] | None = None
) -> None:
    """On ranks (`members` of four, if given) every case gives what it gives in one process, by relative error."""
    [ranks] = {cut.ranks for _, cut in rows.values()}

    def on_rank(rank: int) -> dict:
        return {name: sharded(case, cut, members=members) for name, (case, cut) in rows.items()}

    found = run_ranks(4 if members else ranks, on_rank)
    found = [found[rank] for rank in members or range(ranks)]
    errors = {}
    for name, (case, cut) in rows.items():
        truth, mine = whole(case, cut), joined([part[name] for part in found], case, cut)
        assert mine.keys() == truth.keys()
        for key, expected in truth.items():
            assert mine[key].shape == expected.shape
            # Plus 0.0, since counts of tokens have no norm.
            scale = max((expected + 0.0).norm().item(), 1e-6)
            errors[f"{name}: {key}"] = (mine[key] - expected + 0.0).norm().item() / scale
    assert {name: error for name, error in errors.items() if not error < limit} == {}


# What the numbers of a document are multiplied by. A document without numbers, as one whose state has overflowed, shows
# what multiplies by zero where it should select.
FACTORS = (0.5, 100.0, float("nan"))


def assert_nothing_leaks(cases: dict[str, OperatorCase], cut: Cut, last: int) -> None:
    """With another document up to `last`, the next one's outputs and gradients stay the same to the bit."""

    def changed(case: OperatorCase, factor: float) -> OperatorCase:
        tensors = {key: x if x is None or key in case.shared else x.clone() for key, x in case.tensors.items()}
        for key in tensors.keys() - set(case.shared):
            if tensors[key] is not None:
                tensors[key][:, : last + 1] *= factor
        return replace(case, tensors=tensors)

    def on_rank(rank: int) -> list[dict[str, dict]]:
        return [{name: sharded(changed(case, by), cut) for name, case in cases.items()} for by in (1.0, *FACTORS)]

    found = run_ranks(cut.ranks, on_rank)
    for name, case in cases.items():
        before, *others = (joined([part[which][name] for part in found], case, cut) for which in range(4))
        for after, factor in zip(others, FACTORS, strict=True):
            for key in ("out", *(key for key, x in case.tensors.items() if x is not None and key not in case.shared)):
                assert torch.equal(before[key][:, last + 1 :], after[key][:, last + 1 :]), (name, key, factor)
            assert not torch.equal(before["out"][:, last], after["out"][:, last]), name


def real(x: Tensor) -> Tensor:
    return x.real + x.imag if x.is_complex() else x
