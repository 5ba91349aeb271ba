"""How an operator is computed where a sequence is split in time: the kinds, one of which is an operator's `time`.

They say what of a part of the sequence its successor needs. Ranks, and what is sent between them, are `parallel`'s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape

if TYPE_CHECKING:
    from seqtrain.kernels.operator import Operator

Options = Mapping[str, Any]


class AffineSegment(ABC):
    """Consecutive tokens of one document (or of B rows) as the map `S -> transition(S) + update` of the incoming state.

    `transition` comes first, so that others can proceed; then `local_output`, all that needs no incoming state; then
    `add_incoming`.
    """

    def __init__(self, operator: "Operator", tensors: Sequence[Any], options: Options, backend: str):
        """`tensors`, `options`: the operator's arguments for these tokens, states and boundaries aside."""
        self.operator = operator
        self.tensors = tensors
        self.options = options
        self.backend = backend

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the operator's state for these tensors."""
        return self.operator.state_shape(self.tensors, self.options, 1)[1]

    @staticmethod
    @abstractmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        """Shape of a transition in a form that `AffineShape` knows; None where it is always the identity."""

    @abstractmethod
    def transition(self) -> tuple[Tensor | None, Tensor]:
        """`(transition, update)`; the transition None for the identity."""

    def local_output(self) -> None:  # noqa: B027
        """What can be computed while the incoming state is on its way; nothing where it came with the map."""

    @abstractmethod
    def add_incoming(self, state: Tensor) -> Tensor:
        """The operator's output, given the state before the first token."""


@dataclass(frozen=True)
class AffineScan:
    """A recurrence whose segments are affine maps of its state."""

    segment: type[AffineSegment]


@dataclass(frozen=True)
class PastInputs:
    """The state is the operator's last inputs, its first tensor, oldest first: `[B or N, count, ...]`.

    `count`: how many, from the operator's tensors and options.
    """

    count: Callable[[Sequence[Any], Options], int]


@dataclass(frozen=True)
class PastKeys:
    """The state is the keys and values seen, as `softmax_attention` keeps them; the option `window` limits them."""


@dataclass(frozen=True)
class PastKeysAndSinks:
    """The state is the last keys and values and a document's first ones, as `sink_attention` keeps them.

    The options `window` and `sinks` say how many.
    """


@dataclass(frozen=True)
class Relayed:
    """Nothing is known but the state, which one part hands to the next."""


RELAYED = Relayed()
TimeSplit = AffineScan | PastInputs | PastKeys | PastKeysAndSinks | Relayed


def by_segment(operator: "Operator") -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator on a part of a sharded sequence: its map, its local output, and what the incoming state adds.

    What comes takes tensors by name, in the operator's order; its `backend="reference"` is the operator's own.
    """

    def run(*, initial_state: Tensor, backend: str, **tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        if backend == "reference":
            return operator(**tensors, initial_state=initial_state, backend=backend)
        part = operator.segment(list(tensors.values()), {}, backend)
        initial_state = initial_state.to(part.state_dtype)
        transition, update = part.transition()
        part.local_output()
        shape = AffineShape.of(update.shape, None if transition is None else transition.shape)
        final = AffineMap(shape.transition(transition), shape.state(update)).apply(shape.state(initial_state))
        return part.add_incoming(initial_state), final.view_as(update)

    return run
