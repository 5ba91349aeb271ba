"""Figures and the bounds of claims."""

import math

import pytest

from experiments.fidelity import Bounds, Curve, Effort, Figure, joined


def test_a_claim_is_judged_by_the_mean():
    figure = Figure("x", (0.9, 1.0), Bounds(at_least=0.95))
    assert figure.mean == pytest.approx(0.95)
    assert figure.spread == pytest.approx(0.0707, abs=1e-4)
    assert figure.holds is True
    assert Figure("x", (0.9, 0.98), Bounds(at_least=0.95)).holds is False
    assert Figure("x", (0.4,), Bounds(0.4, 0.6)).holds is True
    assert Figure("x", (0.7,), Bounds(0.4, 0.6)).holds is False
    assert Figure("x", (math.nan,), Bounds(at_most=1.0)).holds is False


def test_a_figure_without_bounds_claims_nothing():
    figure = Figure("x", (0.5,))
    assert figure.holds is None
    assert figure.spread == 0.0
    assert str(figure.bounds) == ""


@pytest.mark.parametrize(
    ("bounds", "words"), [(Bounds(at_least=0.95), ">= 0.95"), (Bounds(0.4, 0.6), ">= 0.4 and <= 0.6")]
)
def test_bounds_are_read_as_words(bounds, words):
    assert str(bounds) == words


def test_effort_scales_counts_and_leaves_one_at_least():
    assert Effort(scale=0.5).of(100) == 50
    assert Effort(scale=0.001).of(100) == 1


def test_figures_of_several_seeds_are_one():
    curves = (Curve("seed 0", (1,), (0.5,)),)
    first = Figure("x", (0.5,), Bounds(at_least=0.4), steps=(10,), seconds=(1.0,), curves=curves)
    second = Figure("x", (0.7,), Bounds(at_least=0.4), steps=(12,), seconds=(2.0,), curves=(Curve("b", (1,), (0.7,)),))
    assert joined([first, second]) == Figure(
        "x", (0.5, 0.7), Bounds(at_least=0.4), steps=(10, 12), seconds=(1.0, 2.0), curves=curves
    )
    with pytest.raises(ValueError, match=r"\['x', 'y'\]"):
        joined([first, Figure("y", (0.5,))])
