"""Figures and the bounds of claims."""

import math

import pytest

from experiments.fidelity import Bounds, Curve, Effort, Figure, joined


def test_a_claim_is_judged_by_the_mean():
    figure = Figure("x", (0.9, 1.0), Bounds(at_least=0.95))
    assert figure.mean == pytest.approx(0.95)
    assert figure.spread == pytest.approx(0.0707, abs=1e-4)
    for values, bounds, holds in (
        ((0.9, 1.0), Bounds(at_least=0.95), True),
        ((0.9, 0.98), Bounds(at_least=0.95), False),
        ((0.4,), Bounds(0.4, 0.6), True),
        ((0.7,), Bounds(0.4, 0.6), False),
        ((math.nan,), Bounds(at_most=1.0), False),
        ((0.5,), Bounds(), None),
    ):
        assert Figure("x", values, bounds).holds is holds
    assert Figure("x", (0.5,)).spread == 0.0
    assert [str(Bounds()), str(Bounds(0.4, 0.6))] == ["", ">= 0.4 and <= 0.6"]


def test_effort_scales_counts_and_leaves_one_at_least():
    assert Effort(scale=0.5).of(100) == 50
    assert Effort(scale=0.001).of(100) == 1


def test_figures_of_several_seeds_are_one():
    curves, bounds = (Curve("seed 0", (1,), (0.5,)),), Bounds(at_least=0.4)
    first = Figure("x", (0.5,), bounds, steps=(10,), seconds=(1.0,), curves=curves)
    second = Figure("x", (0.7,), bounds, steps=(12,), seconds=(2.0,), curves=(Curve("b", (1,), (0.7,)),))
    both = Figure("x", (0.5, 0.7), bounds, steps=(10, 12), seconds=(1.0, 2.0), curves=curves)
    assert joined([first, second]) == both
    with pytest.raises(ValueError, match=r"\['x', 'y'\]"):
        joined([first, Figure("y", (0.5,))])
