"""Python's garbage collector, kept away from what lives as long as the process does.

A start makes a million objects, nearly all of them modules, and none is garbage. Each pass over them takes 0.1 to
0.2 s, and there are seven before the first step.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No pass is made within."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def lasting() -> Iterator[None]:
    """No pass is made within, nor any over what there is at the end: for what is imported, once a process."""
    try:
        with paused():
            yield
    finally:
        gc.freeze()
        # Libraries count what is left at the very end, and complain.
        atexit.register(gc.unfreeze)
