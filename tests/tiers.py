"""Which combinations of a test's parameters run in which tier."""

import itertools
from typing import Any

import pytest


def half(*axes: Any, tier: str = "full") -> list:
    """Parameters: every combination of the axes' values, those whose places add up to an odd number in `tier` alone.

    What is left is half of them, in which any two values of different axes still meet, where a third axis has two
    values or more.
    """
    places = itertools.product(*(range(len(axis)) for axis in axes))
    return [
        pytest.param(*each, marks=getattr(pytest.mark, tier) if sum(place) % 2 else ())
        for place, each in zip(places, itertools.product(*axes), strict=True)
    ]
