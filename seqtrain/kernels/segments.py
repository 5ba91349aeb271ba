"""How an operator is split where a sequence is cut in time: what its package's `segment.py` says about it.

A `segment.py` defines `SEGMENT`: a subclass of `AffineSegment` for a recurrence whose segments are affine maps of its
state, `PastInputs` for an operator whose state is its last inputs, `PastKeys` for softmax attention, or
`PastKeysAndSinks` for that of windows with sinks. An operator
without one can still be run piece after piece, since its state is all it knows of the past.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape

Options = Mapping[str, Any]


class AffineSegment(ABC):
    """Consecutive tokens of one document (or of B rows) as the map `S -> transition(S) + update` of the incoming state.

    `find_map` comes first, so that others can go on; then `work`, all that needs no incoming state; then `finish`.
    """

    def __init__(self, tensors: Sequence[Any], options: Options, backend: str):
        """`tensors`, `options`: the operator's arguments for these tokens, states and boundaries aside."""
        self.tensors = tensors
        self.options = options
        self.backend = backend

    @staticmethod
    @abstractmethod
    def state_shape(tensors: Sequence[Any], options: Options) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the state of one document, or of B rows."""

    @staticmethod
    @abstractmethod
    def transition_shape(tensors: Sequence[Any], options: Options) -> tuple[int, ...] | None:
        """Shape of a transition in a form that `AffineShape` knows; None where it is always the identity."""

    @abstractmethod
    def find_map(self) -> tuple[Tensor | None, Tensor]:
        """`(transition, update)`; the transition None for the identity."""

    @abstractmethod
    def work(self) -> None:
        """What can be computed while the incoming state is on its way."""

    @abstractmethod
    def finish(self, state: Tensor) -> Tensor:
        """The operator's output, given the state before the first token."""


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


Segment = type[AffineSegment] | PastInputs | PastKeys | PastKeysAndSinks


def segment_of(operator: Callable) -> Segment | None:
    """What the operator's package says about splitting it, None if it says nothing."""
    return segment_of_package(operator.__module__)


@cache
def segment_of_package(package: str) -> Segment | None:
    """The same by the package's name."""
    name = f"{package}.segment"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the operator is not a package: it stands in a file of its own
        return None
    return None if found is None else importlib.import_module(name).SEGMENT


def by_segment(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator as a rank computes it on its part of a cut sequence: its map, its work, and what the state adds.

    The segments of `operator` are affine. What comes takes tensors by name, in the operator's order; its
    `backend="reference"` is the operator's own.
    """

    def run(*, initial_state: Tensor, backend: str, **tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        segment = segment_of(operator)
        assert isinstance(segment, type)
        if backend == "reference":
            return operator(**tensors, initial_state=initial_state, backend=backend)
        part = segment(list(tensors.values()), {}, backend)
        initial_state = initial_state.to(segment.state_shape(part.tensors, part.options)[1])
        transition, update = part.find_map()
        part.work()
        shape = AffineShape.of(update.shape, None if transition is None else transition.shape)
        final = AffineMap(shape.transition(transition), shape.state(update)).apply(shape.state(initial_state))
        return part.finish(initial_state), final.view_as(update)

    return run
