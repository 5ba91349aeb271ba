"""Tables that are printed row by row: cells stand below their titles."""

from seqtrain.report import LiveTable


def test_cells_stand_below_their_titles():
    table = LiveTable({"name": "8", "bytes": "9,d", "ms": "7.2f", "half": ">6", " against": ""})
    assert table.header == "name         bytes      ms   half  against"
    assert table.row("a", 12345, 1.5, "never", " other") == "a           12,345    1.50  never  other"


def test_what_is_not_known_is_left_empty():
    table = LiveTable({"model": "9.2f", "/model": "7.2f", "name": "4"})
    assert table.row(None, 2, "x") == "             2.00 x"
    assert table.row(1.0, None, None) == "     1.00"
