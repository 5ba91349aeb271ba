"""Parquet tables: every row is one document."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from seqtrain.data.sources._base import Document, Place, Source
from seqtrain.data.sources._columns import inner, outer
from seqtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet

# Rows decoded at a time, and bytes read ahead.
ROWS = 64
BUFFER = 2**18


class Parquet(Source):
    """`data.path`: a file, a folder (its `*.parquet`) or a pattern; the text is the column `data.text_field`, or in it.

    Rows are held out by a hash of their text.
    """

    unit = "rows"
    suffix = ".parquet"

    @property
    def total(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def documents_of(self, file: Path, start: Place) -> Iterator[Document]:
        table, path = self._open(file), self.config.text_field
        column = outer(path, table.schema_arrow.names, str(file))
        for first, batch in batches(file, table, [column], start.at):
            for row, value in enumerate(inner(batch.column(0), path, column, f"{file}: row {first} and on"), first):
                if row >= start.at:
                    name = f"{file}: row {row}"
                    here, after = start._replace(at=row), start._replace(at=row + 1)
                    yield self.row(name, self._text(name, value), 1, here, after)

    def stretches_of(self, file: Path, start: Place, size: int) -> Iterator[tuple[Place, int]]:
        whole = file.stat().st_size
        yield from [(start, whole)] if whole < 2 * size else row_groups(open_table(file), start, whole)

    def _text(self, name: str, value: "pyarrow.Scalar") -> object:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            if self.config.invalid_utf8 == "replace":
                return value.as_buffer().to_pybytes().decode("utf-8", errors="replace")
            raise DataError(f"{name}: not UTF-8 at byte {error.start}; data.invalid_utf8=replace takes it") from None

    def _open(self, file: Path) -> "pyarrow.parquet.ParquetFile":
        table = open_table(file)
        outer(self.config.text_field, table.schema_arrow.names, str(file))
        return table


def open_table(file: Path) -> "pyarrow.parquet.ParquetFile":
    """A table whose rows are read as they are needed. Raises `DataError`."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered: a page is held at a time, where the other ways hold the whole column of a row group.
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file: {error}") from None


def row_groups(table: "pyarrow.parquet.ParquetFile", start: Place, size: int) -> Iterator[tuple[Place, int]]:
    """Where the row groups of a table of `size` bytes begin, and how long they are: they are read from their start."""
    metadata = table.metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        yield start, size * rows // max(metadata.num_rows, 1)
        start = start._replace(at=start.at + rows)


def batches(
    file: Path, table: "pyarrow.parquet.ParquetFile", columns: list[str], wanted: int
) -> "Iterator[tuple[int, pyarrow.RecordBatch]]":
    """The rows from the row group of row `wanted` on, a few at a time, with the number of the first."""
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    # Row groups before the first wanted row are never read.
    ends = list(accumulate(sizes))
    first = bisect_right(ends, wanted)
    row = ends[first] - sizes[first] if first < len(ends) else 0
    found = table.iter_batches(ROWS, row_groups=list(range(first, len(sizes))), columns=columns)
    while (batch := _next(found, f"{file}: row {row}")) is not None:
        yield row, batch
        row += batch.num_rows


def _next(batches: "Iterator[pyarrow.RecordBatch]", place: str) -> "pyarrow.RecordBatch | None":
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{place} and on: damaged: {error}") from None
