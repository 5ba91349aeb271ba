"""Seconds of what a row compares."""

import math
import time
from collections.abc import Callable
from typing import Any


def fastest(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls; one before them, which fills caches, doesn't count."""
    best = math.inf
    for turn in range(repeats + 1):
        started = time.perf_counter()
        function()
        if turn:
            best = min(best, time.perf_counter() - started)
    return best
