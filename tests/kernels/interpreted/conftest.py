"""Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest -m interpreter`."""

import os

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.interpreter)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Triton decides when it is imported whether it interprets or compiles.
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 in the environment")
