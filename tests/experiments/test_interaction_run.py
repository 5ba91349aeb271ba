"""Measuring interaction operators: a small run tells ranks and reach; what can't be measured is named."""

import json

from tests.command_cases import run_command

COMMAND = "experiments.interaction.run"


def test_ranks_are_the_heads_where_they_must_be(tmp_path):
    sizes = ("mixers=[attention,delta_net,s5]", "heads=[2,3]", "width=8", "tokens=10", "threads=1")
    done = run_command(COMMAND, *sizes, f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "interaction_operator.json").read_text())
    ranks = {(row["mixer"], row["heads"]): row["found"]["rank"] for row in report["mixers"]}
    # The short convolution is off: with it, DeltaNet's neighbors would mix before the operator.
    assert ranks["attention", 2] == ranks["delta_net", 2] == 2
    assert ranks["s5", 2] == ranks["s5", 3] > 2
    assert all(len(row["found"]["reach"]) == 10 for row in report["mixers"])
    # What does not fit is skipped by name.
    assert set(report["skipped"]) == {"attention, 3 heads", "delta_net, 3 heads"}
    assert "skipped attention, 3 heads: model.width=8: must be divisible by model.heads=3" in done.out
    assert "rank = heads needed" in done.out
    for name in ("spectra.png", "reach.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
