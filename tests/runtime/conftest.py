"""What the tests of the runtime share."""

import pytest


@pytest.fixture(autouse=True)
def limit(request):
    """A hang names its test. DeepSpeed and Ray take their time to start, so this is longer than most tests need."""
    request.node.add_marker(pytest.mark.timeout(180))
