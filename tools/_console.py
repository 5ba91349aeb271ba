"""Tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Columns of text where the output is no terminal, which would say its own: rows of a log are not folded.
WIDTH = 300


def open_console() -> Console:
    """The terminal, or as wide a page as tables need where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows` below `columns`; texts to the left, numbers to the right."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        words = index == 0 or any(row[index][:1].isalpha() for row in rows)
        shown.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        # A Text, since brackets in a plain string are markup.
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
