"""A segment of a recurrence as an affine map of its state, `S_out = transition(S_in) + update` (docs/math.md, 2).

Every recurrence reduces to one canonical form: the state is `[rows, depth, columns]`, and each row has a transition of
its own, `[rows, depth, depth]`. A decay is the case `depth == 1` (a row is what shares one factor); a delta rule's
dense transition has `depth == K`. So one code applies, composes and transposes them all, and a state can be cut into
independent blocks along rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class AffineShape:
    """How a state decomposes: `rows` independent maps of `[depth, columns]` matrices; `identity`: nothing decays."""

    rows: int
    depth: int
    columns: int
    identity: bool

    @classmethod
    def of(cls, update: Sequence[int], transition: Sequence[int] | None) -> "AffineShape":
        """The canonical form of maps with these tensor shapes.

        `update`: `[B,H,K,V]`, or any state of at least one dimension (`[B,D]` for a diagonal scan).
        `transition`: None (identity); a leading part of the update's shape, up to three dimensions (`[B,H]`, `[B,H,K]`,
        `[B,D]`: broadcast over the trailing dimensions); or dense `[B,H,K,K]`. Raises `ValueError`.
        """
        update, came = tuple(update), None if transition is None else tuple(transition)
        if came is None:
            return cls(rows=1, depth=1, columns=prod(update), identity=True)
        if len(update) == 4 and came == (*update[:-1], update[-2]):
            return cls(rows=prod(update[:-2]), depth=update[-2], columns=update[-1], identity=False)
        if 1 <= len(came) <= min(3, len(update)) and came == update[: len(came)]:
            return cls(rows=prod(came), depth=1, columns=prod(update[len(came) :]), identity=False)
        dense = f", or dense {(*update[:-1], update[-2])}" if len(update) == 4 else ""
        raise ValueError(
            f"transition has shape {came}, expected None, a leading part of update's shape {update}{dense}"
        )

    @property
    def state_numbers(self) -> int:
        """How many numbers a state has."""
        return self.rows * self.depth * self.columns

    @property
    def transition_numbers(self) -> int:
        """How many numbers a transition has, 0 for the identity."""
        return 0 if self.identity else self.rows * self.depth * self.depth

    def state(self, tensor: Tensor) -> Tensor:
        """`tensor`, an update or a state of any layout, as `[rows, depth, columns]`."""
        return tensor.reshape(self.rows, self.depth, self.columns)

    def transition(self, tensor: Tensor | None) -> Tensor | None:
        """`tensor`, a transition, as `[rows, depth, depth]`."""
        return None if tensor is None else tensor.reshape(self.rows, self.depth, self.depth)


@dataclass(frozen=True)
class AffineMap:
    """`S -> transition(S) + update` in canonical form.

    `transition`: `[rows, depth, depth]`, or None for the identity. `update`: `[rows, depth, columns]`, the state the
    segment leaves when it starts from zero. Both of one floating or complex dtype. `forgets`: S has no influence, be it
    infinite; the transition, zero times which would be NaN, is not read.
    """

    transition: Tensor | None
    update: Tensor
    forgets: bool = False

    def apply(self, state: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`transition(state) + update` for `state: [rows, depth, columns]`, written to `out` if given."""
        if self.forgets:
            return self.update.clone() if out is None else out.copy_(self.update)
        if self.transition is None:
            return torch.add(state, self.update, out=out)
        if self.update.shape[1] == 1:
            return torch.addcmul(self.update, self.transition, state, out=out)
        return torch.baddbmm(self.update, self.transition, state, out=out)

    def after(self, earlier: "AffineMap") -> "AffineMap":
        """The composition "first `earlier`, then this one": `(M2 M1, M2 U1 + U2)`."""
        if self.forgets:
            return self
        first, second = earlier.transition, self.transition
        transition = first if second is None else second if first is None else multiply(second, first)
        return AffineMap(transition, self.apply(earlier.update), earlier.forgets)


def multiply(transition: Tensor, right: Tensor) -> Tensor:
    """`transition @ right` row by row: `[rows, depth, depth]` by `[rows, depth, any]`."""
    return transition * right if transition.shape[-1] == 1 else torch.bmm(transition, right)


def transpose(transition: Tensor | None) -> Tensor | None:
    """The map that carries gradients back: the conjugate transpose of each row's transition."""
    return None if transition is None else transition.mT.conj().resolve_conj()


def transition_gradient(gradient: Tensor, state: Tensor) -> Tensor:
    """The transition's gradient `[rows, depth, depth]`, from the outgoing state's gradient and the incoming state.

    Both `[rows, depth, columns]`. For `depth == 1` this is their product summed over what the factor is shared across:
    there is no division by the factor, which may be zero.
    """
    if gradient.shape[1] == 1:
        return (gradient * state.conj()).sum(-1, keepdim=True)
    return torch.bmm(gradient, state.mT.conj())
