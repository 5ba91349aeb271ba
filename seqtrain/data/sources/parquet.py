"""Parquet tables: every row is one document."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from seqtrain.data.sources._base import START, Cursor, Document, Ends, Place, Source
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

    def documents(self, start: Place = START) -> Iterator[Document]:
        for number, file in self.numbered(start.file):
            yield from self._rows(number, file, self._open(file), start.at if number == start.file else 0)

    def stretches(self, size: int, ends: Ends) -> Iterator[tuple[Cursor, int]]:
        for (cursor, whole), (number, file) in zip(super().stretches(size, ends), self.numbered(), strict=True):
            if whole < 2 * size:
                yield cursor, whole
                continue
            # Its row groups: they are read from their start.
            metadata, row = self._open(file).metadata, 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                yield cursor._replace(place=Place(number, row)), whole * rows // max(metadata.num_rows, 1)
                row += rows

    def _rows(self, number: int, file: Path, table: "pyarrow.parquet.ParquetFile", skip: int) -> Iterator[Document]:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        # Row groups before the first wanted row are never read.
        ends = list(accumulate(sizes))
        first = bisect_right(ends, skip)
        row = ends[first] - sizes[first] if first < len(ends) else 0
        groups = list(range(first, len(sizes)))
        path = self.config.text_field
        name = outer(path, table.schema_arrow.names, str(file))
        batches = table.iter_batches(ROWS, row_groups=groups, columns=[name])
        while (batch := _next(batches, f"{file}: row {row}")) is not None:
            for value in inner(batch.column(0), path, name, f"{file}: row {row} and on"):
                if row >= skip:
                    here = f"{file}: row {row}"
                    yield self.row(here, self._text(here, value), 1, Place(number, row), Place(number, row + 1))
                row += 1

    def _text(self, name: str, value: "pyarrow.Scalar") -> object:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            if self.config.invalid_utf8 == "replace":
                return value.as_buffer().to_pybytes().decode("utf-8", errors="replace")
            raise DataError(f"{name}: not UTF-8 at byte {error.start}; data.invalid_utf8=replace takes it") from None

    def _open(self, file: Path) -> "pyarrow.parquet.ParquetFile":
        import pyarrow
        import pyarrow.parquet

        try:
            # Buffered: a page is held at a time, where the other ways hold the whole column of a row group.
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a parquet file: {error}") from None
        outer(self.config.text_field, table.schema_arrow.names, str(file))
        return table


def _next(batches: "Iterator[pyarrow.RecordBatch]", place: str) -> "pyarrow.RecordBatch | None":
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{place} and on: damaged: {error}") from None
