"""A machine's part of a run, without Ray: its fork server may be killed at any moment."""

import pickle
import sys
from functools import partial

import pytest

from seqtrain.runtime.host import Host


def rest(seconds, pulse):
    import time

    time.sleep(seconds)


def states(host, ended):
    """What the host tells of its ranks, once it has told of all, or all have ended."""
    seen, found = -1, []
    while len(found) < 2 or (ended and any(state[2] is None for state in found)):
        seen, found = host.watch(seen, 60.0)
    return found


@pytest.mark.all
@pytest.mark.parametrize("early", [False, True], ids=["as ranks run", "before it has forked them"])
def test_ranks_are_started_again_after_their_fork_server_was_killed(tmp_path, early):
    host = Host([path for path in sys.path if path], str(tmp_path))
    try:
        assert "error" not in host.about()
        if early:
            host._server.kill()
        host.start({0: {}, 1: {}}, pickle.dumps(partial(rest, 60)))
        if not early:
            assert [state[2] for state in states(host, ended=False)] == [None, None]
            host._server.kill()
        assert [state[2] for state in states(host, ended=True)] == [-9, -9]
        host.start({0: {}, 1: {}}, pickle.dumps(partial(rest, 0)))
        assert [state[2] for state in states(host, ended=True)] == [0, 0]
    finally:
        host.close()
