"""Tables of the terminal whose rows are printed as they are measured."""

import re
from collections.abc import Mapping
from typing import Any


class LiveTable:
    """Rows under one header. `columns`: the title of each and the format of its cells, such as "6d", "9.2f" or "18"."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = tuple(columns.values())
        self._titles = [self._title(form) for form in self._formats]
        self.header = " ".join(format(title, form) for title, form in zip(columns, self._titles, strict=True)).rstrip()

    @staticmethod
    def _title(form: str) -> str:
        """The format of a text as wide as a cell of `form`, on the side on which the cell stands."""
        found = re.match(r"([<>]?)(\d*)", form)
        assert found, f"a format of cells: {form!r}"
        numbers = form[-1:] in ("d", "e", "f", "g", "%")
        return (found[1] or "<>"[numbers]) + found[2]

    def row(self, *cells: Any) -> str:
        """One line; None leaves its cell empty."""
        shown = (
            format("", title) if cell is None else format(cell, form)
            for cell, form, title in zip(cells, self._formats, self._titles, strict=True)
        )
        return " ".join(shown).rstrip()
