"""Reports of commands: tables on the terminal, one HTML page, JSON, figures, and the machine the numbers come from."""

import base64
import dataclasses
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqtrain.files import replace_file

# Columns of a terminal that what is printed fits in.
WIDTH = 100

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; display: block; margin: 0.5rem 0 1.5rem }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 13px }"""


def say(*lines: str) -> None:
    """Prints lines, broken where they are wider than `WIDTH`."""
    for line in lines:
        print(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def show_command(words: Iterable[str]) -> None:
    """Prints a command that can be pasted, on as many lines as it needs."""
    lines = textwrap.wrap(" ".join(map(_unbroken, words)), WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    print(" \\\n    ".join(lines).replace(_SPACE, " "))


# Stands for a space inside a quoted word, where no line may end.
_SPACE = "\0"


def _unbroken(word: str) -> str:
    return shlex.quote(word).replace(" ", _SPACE)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def announced(what: str, tell: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Says `what` is done while the block runs, and at its end how long it took."""
    began = time.monotonic()
    tell(f"{what} ...")
    yield
    tell(f"{what}: {time.monotonic() - began:.0f} s")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows` below `columns`; texts to the left, numbers to the right."""
    forms = []
    for index, cells in enumerate(zip(columns, *rows, strict=True)):
        words = index == 0 or any(cell[:1].isalpha() for cell in cells[1:])
        forms.append(f"{'<' if words else '>'}{max(map(len, cells))}")
    for row in (columns, *rows):
        print("  ".join(format(cell, form) for cell, form in zip(row, forms, strict=True)).rstrip())


class LiveTable:
    """A table whose rows are printed as they are measured, under one header.

    `columns`: the title of each and the format of its cells, such as "6d", "9.2f" or "18".
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = tuple(columns.values())
        # The format of a text as wide as a cell, on the side on which the cell stands.
        pattern = re.compile(r"([<>]?)(\d*).*?([defg%]?)")
        found = [pattern.fullmatch(form) for form in self._formats]
        self._texts = [(each[1] or "<>"[bool(each[3])]) + each[2] for each in found if each]
        self.header = " ".join(format(title, text) for title, text in zip(columns, self._texts, strict=True)).rstrip()

    def row(self, *cells: Any) -> str:
        """One line; None leaves its cell empty."""
        shown = (
            format("", text) if cell is None else format(cell, form)
            for cell, form, text in zip(cells, self._formats, self._texts, strict=True)
        )
        return " ".join(shown).rstrip()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML of a table of texts."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def picture(path: Path, title: str) -> str:
    """HTML of a PNG file, its bytes in the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">\n'


def text(lines: Iterable[str]) -> str:
    """HTML of one paragraph per line."""
    return "".join(f"<p>{escape(line)}</p>\n" for line in lines)


def listing(content: str) -> str:
    """HTML of `content`, letter by letter."""
    return f"<pre>{escape(content)}</pre>\n"


def write_page(path: Path, title: str, sections: Iterable[tuple[str, str]]) -> None:
    """Writes one HTML file that needs nothing else; `sections` are headings and the HTML below each."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections)
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )
    _write(path, page.encode())


def write_json(path: Path, content: Any, *, allow_nan: bool = True) -> None:
    """Writes `content` as indented JSON. `ValueError` for numbers that JSON has no word for, unless `allow_nan`."""
    _write(path, (json.dumps(content, indent=1, allow_nan=allow_nan) + "\n").encode())


def write_results(path: Path, settings: Any, *, about: Mapping[str, str] | None = None, **results: Any) -> None:
    """Writes JSON of `results` below the machine they are from (`about`, or this one) and the command's `settings`."""
    write_json(path, {"machine": about or machine(), "settings": dataclasses.asdict(settings), **results})


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, with a canvas of its own: no window, no state shared through pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, *, dpi: int = 120) -> None:
    """Writes a PNG whose bytes follow from what was drawn, not from the library's version; makes missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None})


def stacked_bars(
    axes: "Axes",
    labels: Sequence[Any],
    values: Sequence[Mapping[str, float]],
    *,
    scale: float = 1.0,
    colors: Mapping[str, str] | None = None,
    upright: bool = False,
) -> list[float]:
    """Draws one bar per label, made of that label's `values` times `scale`, one color per name; returns the lengths.

    Names come in the order in which they first occur. Bars lie, or stand where they are `upright`.
    """
    names = list(dict.fromkeys(name for each in values for name in each))
    ends = [0.0] * len(labels)
    for number, name in enumerate(names):
        sizes = [scale * each.get(name, 0.0) for each in values]
        color = colors[name] if colors else f"C{number % 10}"
        style: dict[str, Any] = {"label": name, "color": color, "hatch": "//" if number >= 10 else None}
        if upright:
            axes.bar(labels, sizes, bottom=ends, **style)
        else:
            axes.barh(labels, sizes, left=ends, **style)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.grid(axis="y" if upright else "x", alpha=0.3)
    limit = 1.04 * max(ends, default=0.0) or 1.0
    axes.set(**{"ylim" if upright else "xlim": (0, limit)})
    return ends


def machine(device: str = "cpu") -> dict[str, str]:
    """The device's name, threads, versions and the commit, for the head of a report."""
    import torch

    import seqtrain

    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    versions = {"torch": torch.__version__, "seqtrain": seqtrain.__version__}
    if cuda:
        versions["triton"] = version("triton")
    return {"device": name, "threads": str(torch.get_num_threads()), "commit": _commit(), **versions}


def in_a_line(about: Mapping[str, str]) -> str:
    """What `machine` says, for the head of a printout."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def version(package: str) -> str:
    """The version of an installed package, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, least and most."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "least": min(values), "most": max(values)}


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles."""
    found = spread(values)
    return found["median"], (found["high"] - found["low"]) / 2
