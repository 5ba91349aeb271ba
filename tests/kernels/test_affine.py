"""Affine maps in canonical form: application, composition and transposition against plain matrices."""

import pytest
import torch

from seqtrain.kernels.affine import AffineMap, AffineShape, transition_gradient, transpose

UPDATE = (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("transition", "update", "expected"),
    [
        (None, UPDATE, (1, 1, 120, True)),
        ((2,), UPDATE, (2, 1, 60, False)),
        ((2, 3), UPDATE, (6, 1, 20, False)),
        ((2, 3, 4), UPDATE, (24, 1, 5, False)),
        ((2, 3, 4, 4), UPDATE, (6, 4, 5, False)),
        ((2, 3, 4, 4), (2, 3, 4, 4), (6, 4, 4, False)),
        ((2, 7), (2, 7), (14, 1, 1, False)),
    ],
)
def test_shapes(transition, update, expected):
    shape = AffineShape.of(update, transition)
    assert (shape.rows, shape.depth, shape.columns, shape.identity) == expected
    assert shape.state_numbers == torch.Size(update).numel()
    assert shape.transition_numbers == (0 if transition is None else torch.Size(transition).numel())


@pytest.mark.parametrize("transition", [(3, 2), (2, 3, 5, 5), (2, 3, 4, 5), (2, 3, 4, 4, 1), ()])
def test_other_shapes_are_refused(transition):
    with pytest.raises(ValueError, match="transition has shape"):
        AffineShape.of(UPDATE, transition)


def random_map(rows, depth, columns, *, identity=False, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    transition = torch.randn(rows, depth, depth, dtype=dtype, generator=generator)
    return AffineMap(
        None if identity else transition, torch.randn(rows, depth, columns, dtype=dtype, generator=generator)
    )


def as_matrix(affine: AffineMap) -> torch.Tensor:
    """The same map on states with a row of ones below: plain matrices compose by themselves."""
    rows, depth, columns = affine.update.shape
    matrix = torch.zeros(rows, depth + columns, depth + columns, dtype=affine.update.dtype)
    matrix[:, :depth, :depth] = torch.eye(depth) if affine.transition is None else affine.transition
    matrix[:, :depth, depth:] = affine.update
    matrix[:, depth:, depth:] = torch.eye(columns)
    return matrix


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("identities", [(False, False), (True, False), (False, True), (True, True)])
def test_composition_is_the_product_of_matrices(depth, identities):
    first, second = (random_map(3, depth, 5, identity=i, seed=s) for s, i in enumerate(identities))
    both = second.after(first)
    torch.testing.assert_close(as_matrix(both), as_matrix(second) @ as_matrix(first))
    state = random_map(3, depth, 5, seed=7).update
    torch.testing.assert_close(both.apply(state), second.apply(first.apply(state)))
    out = torch.full_like(state, float("nan"))
    assert second.apply(state, out=out) is out
    torch.testing.assert_close(out, second.apply(state))


@pytest.mark.parametrize("depth", [1, 4])
def test_transposition_and_gradient_are_autograds(depth):
    affine = random_map(3, depth, 5)
    assert affine.transition is not None
    state, gradient = (random_map(3, depth, 5, seed=s).update for s in (1, 2))
    transition = affine.transition.clone().requires_grad_()
    state.requires_grad_()
    AffineMap(transition, affine.update).apply(state).backward(gradient)
    back = AffineMap(transpose(affine.transition), torch.zeros_like(gradient))
    torch.testing.assert_close(back.apply(gradient), state.grad)
    torch.testing.assert_close(transition_gradient(gradient, state.detach()), transition.grad)
