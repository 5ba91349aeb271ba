"""Tables of texts on the terminal, plain enough for a log."""

from collections.abc import Sequence


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows` below `columns`; texts to the left, numbers to the right."""
    everything = [columns, *rows]
    widths = [max(len(row[index]) for row in everything) for index in range(len(columns))]
    left = [any(row[index][:1].isalpha() for row in rows) for index in range(len(columns))]
    for row in everything:
        line = (c.ljust(w) if ragged else c.rjust(w) for c, w, ragged in zip(row, widths, left, strict=True))
        print("  ".join(line).rstrip())
