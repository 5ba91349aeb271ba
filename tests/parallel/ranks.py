"""Tests that say what each rank does."""

from collections.abc import Callable

import pytest

from seqtrain.parallel.testing import run_ranks


def on_ranks(ranks: int, *, quick: bool = False, **options: float) -> Callable[[Callable], Callable]:
    """Makes a function of a rank's number a test on `ranks` forked ones, in the tier `all` unless it is `quick`."""

    def as_test(on_rank: Callable[[int], None]) -> Callable[[], None]:
        def test() -> None:
            run_ranks(ranks, on_rank, **options)

        test.__doc__ = on_rank.__doc__
        return test if quick else pytest.mark.all(test)

    return as_test
