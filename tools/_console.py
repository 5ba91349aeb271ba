"""Tables on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Columns of text where the output is no terminal, which would say its own.
WIDTH = 140


def open_console() -> Console:
    """The terminal, or as wide a page as tables need where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table of texts: the first column to the left, the others, which are numbers, to the right."""
    shown = Table()
    shown.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        shown.add_column(column, justify="right", overflow="fold")
    for row in rows:
        # A Text, since brackets in a plain string are markup.
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
