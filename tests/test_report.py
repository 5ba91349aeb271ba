"""Reports: what the terminal, the page, the JSON and the bars show."""

import json
import re

import pytest

from seqtrain import report


def test_a_table_on_the_terminal_keeps_brackets_and_aligns_numbers(capsys):
    report.show_table(("layer", "ms"), [("[gla]", "1.5"), ("mlp", "12.25")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["layer", "ms"], ["[gla]", "1.5"], ["mlp", "12.25"]]
    assert lines[1].index("1.5") + 3 == lines[2].index("12.25") + 5


def test_a_page_holds_its_pictures_and_escapes_its_texts(tmp_path):
    figure = report.new_figure(2, 2)
    for name in ("one.png", "again.png"):
        report.save_figure(figure, tmp_path / "new" / name)
    png = (tmp_path / "new" / "one.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert png == (tmp_path / "new" / "again.png").read_bytes()
    sections = [
        ("A & B", report.table(("<a>",), [("1 < 2",)]) + report.text(["so & so"])),
        ("picture", report.picture(tmp_path / "new" / "one.png", "a picture") + report.listing("x: [1]\n  <y>")),
    ]
    report.write_page(tmp_path / "pages" / "page.html", "a <title>", sections)
    page = (tmp_path / "pages" / "page.html").read_text()
    assert "<h1>a &lt;title&gt;</h1>" in page
    assert "<td>1 &lt; 2</td>" in page
    assert "<p>so &amp; so</p>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "x: [1]\n  &lt;y&gt;" in page
    # Properties of CSS have these names.
    assert re.findall(r"(border-\w+|boundary-\w+)", page) == ["border-collapse", "border-bottom"]


def test_json_refuses_what_it_has_no_word_for_where_asked(tmp_path):
    report.write_json(tmp_path / "a" / "b.json", {"x": [1, 2.5]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1, 2.5]}
    with pytest.raises(ValueError):
        report.write_json(tmp_path / "c.json", float("nan"), allow_nan=False)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("upright", [False, True])
def test_bars_are_stacked_in_the_order_of_names(upright):
    axes = report.new_figure(2, 2).subplots()
    ends = report.stacked_bars(axes, ["a", "b"], [{"x": 1.0, "y": 2.0}, {"y": 4.0}], scale=10.0, upright=upright)
    assert ends == [30.0, 40.0]
    assert axes.get_legend_handles_labels()[1] == ["x", "y"]
    sides = [(bar.get_y(), bar.get_height()) if upright else (bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert sides == [(0, 10), (0, 0), (10, 20), (0, 40)]


def test_a_report_says_where_it_was_made():
    assert {"device", "threads", "commit", "torch", "seqtrain"} <= report.machine().keys()
    assert report.version("no-such-package") == "absent"
    assert report.version("torch")[0].isdigit()


def test_cells_stand_below_their_titles():
    table = report.LiveTable({"name": "8", "bytes": "9,d", "ms": "7.2f", "half": ">6", " against": ""})
    assert table.header == "name         bytes      ms   half  against"
    assert table.row("a", 12345, 1.5, "never", " other") == "a           12,345    1.50  never  other"


def test_what_is_not_known_is_left_empty():
    table = report.LiveTable({"model": "9.2f", "/model": "7.2f", "name": "4"})
    assert table.row(None, 2, "x") == "             2.00 x"
    assert table.row(1.0, None, None) == "     1.00"
