"""The tiers of the suite, and what all its tests share.

    python -m pytest            the quick loop: minutes, no training runs, hardly any processes
    python -m pytest --all      what CI runs: also tests that train, start processes or compile for long
    python -m pytest --full     also campaigns and large grids, without a limit of time
    TRITON_INTERPRET=1 python -m pytest -m interpreter    Triton kernels, interpreted on the CPU

A test marked `all` or `full` runs in the tier of its mark and those above, or where it is named by its node id.
"""

import os

import pytest
import torch

from seqtrain.parallel import cost

# The tests' models are tiny: more threads would only wait for each other. A pool of threads that exists before a fork
# is dead after it, so tests that fork ranks need this, too.
torch.set_num_threads(1)
# No test asks which schedule of a scan is the fastest here; forked ranks measure their links as often as they must.
cost.REPEATS = 2

# Begun first, so that no worker is left alone with one of them at the end.
LONGEST = ("tests/docs/", "tests/runtime/test_ray.py", "tests/test_wheel.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--all", action="store_true", help="also run the tests marked `all`: what CI runs")
    group.addoption("--full", action="store_true", help="also run the tests marked `all` and `full`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = [argument for argument in config.invocation_params.args if "::" in str(argument)]
    left_out = [item for item in items if not _is_selected(item, config) and not _is_named(item, named)]
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def _is_selected(item: pytest.Item, config: pytest.Config) -> bool:
    full = config.getoption("--full")
    if item.get_closest_marker("full"):
        return full
    if item.get_closest_marker("all") and not (full or config.getoption("--all")):
        return False
    return INTERPRETED or not item.get_closest_marker("interpreter")


def _is_named(item: pytest.Item, named: list) -> bool:
    return any(item.nodeid.startswith(str(name).removeprefix("./")) for name in named)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Triton decides when it is imported whether it interprets or compiles.
    if item.get_closest_marker("interpreter") and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1 in the environment")
