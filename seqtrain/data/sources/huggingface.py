"""A Hugging Face dataset on disk: every row is one document."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from seqtrain.data.sources._base import START, Cursor, Document, Ends, Place, Source
from seqtrain.data.sources._columns import inner, outer
from seqtrain.data.sources._files import Found
from seqtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow

# Rows decoded at a time.
ROWS = 64


class HuggingFaceDataset(Source):
    """`data.path`: a folder written by `Dataset.save_to_disk`; the text is the column `data.text_field`, or in it.

    For a folder of several splits give one of them, and another as `data.held_out_path` if wanted. Rows are held out
    by a hash of their text otherwise. Nothing is downloaded.
    """

    unit = "rows"
    suffix = ".arrow"

    def find(self) -> tuple[Path, Found]:
        root, found = super().find()
        if (root / "dataset_dict.json").is_file():
            splits = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
            raise DataError(
                f"{self.part.key}: {root} holds the splits {splits}; give one of them, such as {root / splits[0]}"
            )
        # The rest is the dataset's own.
        return root, Found(found.files)

    @property
    def total(self) -> int:
        return len(self._open())

    def documents(self, start: Place = START) -> Iterator[Document]:
        dataset = self._open().with_format("arrow")
        # Its rows are picked by numbers, which would be followed before anything can be checked.
        if dataset._indices is not None:
            self._checked("its rows", lambda: dataset.data.table)
        for first in range(start.at, len(dataset), ROWS):
            rows = self._checked(f"row {first} and on", partial(dataset.__getitem__, slice(first, first + ROWS)))
            where = f"{self.root}: row {first} and on"
            texts = inner(rows.column(0), self.config.text_field, rows.column_names[0], where)
            for row, text in enumerate(texts.to_pylist(), start=first):
                yield self.row(f"{self.root}: row {row}", text, 1, Place(0, row), Place(0, row + 1))

    def stretches(self, size: int, ends: Ends) -> Iterator[tuple[Cursor, int]]:
        rows, whole = len(self._open()), sum(length for _, length in super().stretches(size, ends))
        step = max(1, rows * size // max(whole, 1))
        for row in range(0, rows, step):
            yield Cursor(place=Place(0, row)), whole * min(step, rows - row) // rows

    def between(self, first: int, last: int) -> Self:
        # Its files are those of one table.
        return self

    def _checked(self, place: str, read: Callable[[], "pyarrow.Table"]) -> "pyarrow.Table":
        """What `read` gives, as arrow itself believes it: what lies where a damaged file says may end the process."""
        import pyarrow

        try:
            table = read()
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            raise DataError(f"{self.root}: {place}: damaged: {error}") from None
        return table

    def _open(self) -> Any:
        import datasets

        try:
            dataset = datasets.load_from_disk(str(self.root))
        # What its files hold is taken as it comes.
        except Exception as error:
            raise DataError(f"{self.root}: not a dataset that save_to_disk wrote: {error}") from None
        return dataset.select_columns([outer(self.config.text_field, dataset.column_names, str(self.root))])
