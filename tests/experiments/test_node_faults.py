"""The campaign of machines that fail: what is said of its cases; some of them, by hand."""

import pytest

from experiments.faults import nodes, run
from experiments.faults.hosts import available
from seqtrain.errors import ConfigError


def test_the_table_counts_by_kind():
    cases = [
        {"kind": "cut", "wrong": [], "lost": 3, "recovered": 20.4, "left": []},
        {"kind": "cut", "wrong": ["losses differ"], "lost": 5, "recovered": 41.0, "left": ["rank"]},
        {"kind": "head", "wrong": []},
    ]
    assert nodes.table(cases) == [("cut", "2", "1", "5", "41 s", "41 s", "1"), ("head", "1", "1", "0", "-", "-", "0")]


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not available(), reason="hosts are made of namespaces, which needs root and iproute2")
def test_a_machine_is_lost_and_another_leaves_in_time(tmp_path_factory):
    # A short path: it holds sockets.
    folder = tmp_path_factory.mktemp("n")
    assert nodes.main([f"output_dir={folder}", "kinds=[kill,notice]", "cases=2"]) == 0


def test_an_unknown_kind_is_named():
    for campaign in (nodes, run):
        with pytest.raises(ConfigError, match=r"kinds 'cutt' is unknown"):
            campaign.main(["kinds=[cutt]"])
