"""Measuring interaction operators: a small run tells ranks and reach; what can't be measured is named."""

import json

import pytest

from tests.command_cases import run_command

COMMAND = "experiments.interaction.run"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interaction")
    sizes = ("mixers=[attention,delta_net,s5]", "heads=[2,3]", "width=8", "tokens=10", "threads=1")
    done = run_command(COMMAND, *sizes, f"output_dir={folder}")
    assert done.status == 0, done.err
    return done.out, folder


def test_ranks_are_the_heads_where_they_must_be(small):
    _, folder = small
    report = json.loads((folder / "interaction_operator.json").read_text())
    ranks = {(row["mixer"], row["heads"]): row["found"]["rank"] for row in report["mixers"]}
    # The short convolution is off: with it, DeltaNet's neighbors would mix before the operator.
    assert ranks["attention", 2] == ranks["delta_net", 2] == 2
    assert ranks["s5", 2] == ranks["s5", 3] > 2
    assert all(len(row["found"]["reach"]) == 10 for row in report["mixers"])


def test_what_does_not_fit_is_skipped_by_name(small):
    printed, folder = small
    skipped = json.loads((folder / "interaction_operator.json").read_text())["skipped"]
    assert set(skipped) == {"attention, 3 heads", "delta_net, 3 heads"}
    assert "skipped attention, 3 heads: model.width=8: must be divisible by model.heads=3" in printed


def test_table_and_pictures_are_left(small):
    printed, folder = small
    assert "rank = heads needed" in printed
    for name in ("spectra.png", "reach.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_an_unknown_mixer_ends_it_in_one_line(tmp_path):
    done = run_command(COMMAND, "mixers=[atention]", f"output_dir={tmp_path}")
    assert done.status == 2
    assert done.err.startswith("error: mixer 'atention' is unknown; did you mean 'attention'?")
    assert list(tmp_path.iterdir()) == []
