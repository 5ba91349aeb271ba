"""What the tests of the runtime share."""

import pytest
import torch

# Forked ranks need it: a thread pool that exists before the fork is dead after it.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def limit(request):
    """A hang names its test. DeepSpeed and Ray take their time to start, so this is longer than most tests need."""
    request.node.add_marker(pytest.mark.timeout(180))
