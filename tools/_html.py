"""One HTML file that needs nothing else: tables, and pictures inside it."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { boundary-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.2rem 0.8rem; boundary-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; display: block; margin: 0.5rem 0 1.5rem }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 13px }"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def picture(path: Path, title: str) -> str:
    """A PNG file, its bytes in the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">\n'


def text(lines: Iterable[str]) -> str:
    """A paragraph a line."""
    return "".join(f"<p>{escape(line)}</p>\n" for line in lines)


def listing(content: str) -> str:
    """`content` as it is, letter by letter."""
    return f"<pre>{escape(content)}</pre>\n"


def write_page(path: Path, title: str, sections: Iterable[tuple[str, str]]) -> None:
    """Writes the page: `sections` are headings and the HTML below each."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )
