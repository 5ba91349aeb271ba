"""The fidelity experiments: rows that train nothing end to end; tables, pictures and mistakes."""

import json
import math

import pytest

from experiments.fidelity import Axes, Bounds, Curve, Effort, Figure, Row, joined
from experiments.fidelity import run as tool
from seqtrain.errors import ConfigError
from tests.command_cases import run_command

COMMAND = "experiments.fidelity.run"


def a_row(name="mine"):
    axes = Axes("step", "accuracy")
    return Row(name, "it works (arXiv 1)", "by trying", axes, lambda effort: iter(()), ("1",), settings={"width": 8})


CURVES = (Curve("c", (1, 2), (0.1, 0.9)),)
FIGURES = (
    Figure("good", (0.9, 1.0), Bounds(at_least=0.9), 0.5, 16, (10, 12), (1.0, 3.0), 7, 8, CURVES),
    Figure("bad", (0.2,), Bounds(at_least=0.9)),
    Figure("seen", (0.3,)),
)


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity")
    done = run_command(COMMAND, "rows=[entropy,query_gradient]", "seeds=[0,1]", "jobs=2", f"output_dir={folder}")
    assert done.status == 0, done.err
    return done.out, folder


@pytest.mark.full
def test_only_the_rows_asked_for_are_measured(two_rows):
    printed, folder = two_rows
    report = json.loads((folder / "fidelity.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["query_gradient", "entropy"]
    assert all(len(figure["values"]) == 2 for row in report["rows"] for figure in row["figures"])
    assert {file.name for file in folder.glob("*.png")} == {"query_gradient.png", "entropy.png"}
    assert "seeds [0, 1]" in printed
    assert printed.count(" holds ") == 4
    assert (folder / "fidelity.md").read_text() in printed


def test_a_figure_is_shown_with_its_claim(tmp_path):
    result = tool.Result(a_row(), list(FIGURES), 1.0)
    good, bad, seen = (list(tool.cells(result, figure).values()) for figure in FIGURES)
    assert good == ["mine", "good", "0.95 ± 0.071", "0.9 1", ">= 0.9", "holds", "0.5", "16", "10-12", "2", "7", "8"]
    assert bad[4:7] == [">= 0.9", "DOES NOT HOLD", ""]
    assert seen[4:6] == ["", ""]
    tool.draw(result, tmp_path / "row.png")
    assert (tmp_path / "row.png").read_bytes().startswith(b"\x89PNG")
    text = tool.markdown("machine", [result])
    assert "**mine**" in text
    assert "Claim: it works (arXiv 1).\nby trying\nSettings: width 8\n" in text


def test_the_share_that_holds_counts_claims_and_papers():
    results = [tool.Result(a_row("a"), list(FIGURES), 1.0), tool.Result(a_row("b"), list(FIGURES[:1]), 1.0)]
    assert tool.share_that_holds(results) == "2 of 3 claims of 1 papers hold"
    assert "2 of 3 claims of 1 papers hold\n\n| row" in tool.markdown("machine", results)
    assert tool.as_json(results[0])["sources"] == ["1"]


def test_numbers_that_are_not_finite_become_null():
    result = tool.Result(a_row(), [Figure("x", (math.nan,))], 1.0)
    stored = tool.as_json(result)
    assert stored["settings"] == {"width": "8"}
    assert stored["figures"][0]["values"] == [None]
    assert stored["figures"][0]["bounds"] == {"at_least": None, "at_most": None}
    json.dumps(stored, allow_nan=False)


def test_rows_keep_the_order_of_the_table():
    table = {"a": a_row("a"), "b": a_row("b"), "c": a_row("c")}
    assert [row.name for row in tool.chosen_rows(["c", "a"], table)] == ["a", "c"]
    assert len(tool.chosen_rows([], table)) == 3
    with pytest.raises(ConfigError, match="rows= 'bb' is unknown"):
        tool.chosen_rows(["bb"], table)


def test_a_claim_is_judged_by_the_mean():
    figure = Figure("x", (0.9, 1.0), Bounds(at_least=0.95))
    assert figure.mean == pytest.approx(0.95)
    assert figure.spread == pytest.approx(0.0707, abs=1e-4)
    for values, bounds, holds in (
        ((0.9, 1.0), Bounds(at_least=0.95), True),
        ((0.9, 0.98), Bounds(at_least=0.95), False),
        ((0.4,), Bounds(0.4, 0.6), True),
        ((0.7,), Bounds(0.4, 0.6), False),
        ((math.nan,), Bounds(at_most=1.0), False),
        ((0.5,), Bounds(), None),
    ):
        assert Figure("x", values, bounds).holds is holds
    assert Figure("x", (0.5,)).spread == 0.0
    assert [str(Bounds()), str(Bounds(0.4, 0.6))] == ["", ">= 0.4 and <= 0.6"]


def test_effort_scales_counts_and_leaves_one_at_least():
    assert Effort(scale=0.5).of(100) == 50
    assert Effort(scale=0.001).of(100) == 1


def test_figures_of_several_seeds_are_one():
    curves, bounds = (Curve("seed 0", (1,), (0.5,)),), Bounds(at_least=0.4)
    first = Figure("x", (0.5,), bounds, steps=(10,), seconds=(1.0,), curves=curves)
    second = Figure("x", (0.7,), bounds, steps=(12,), seconds=(2.0,), curves=(Curve("b", (1,), (0.7,)),))
    both = Figure("x", (0.5, 0.7), bounds, steps=(10, 12), seconds=(1.0, 2.0), curves=curves)
    assert joined([first, second]) == both
    with pytest.raises(ValueError, match=r"\['x', 'y'\]"):
        joined([first, Figure("y", (0.5,))])
