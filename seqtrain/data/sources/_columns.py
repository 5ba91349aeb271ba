"""The text in a column of a table, or in the fields of one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seqtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow


def outer(path: str, columns: Sequence[str], where: str) -> str:
    """The one of `columns` that holds the text at `path`. Raises `DataError`."""
    found = path if path in columns else path.partition(".")[0]
    if found not in columns:
        raise DataError(f"{where}: no column {path!r}, only {list(columns)[:8]}; set data.text_field")
    return found


def inner(column: "pyarrow.ChunkedArray", path: str, name: str, where: str) -> "pyarrow.ChunkedArray":
    """What the column `name` holds at `path`: itself, or one of its fields. Raises `DataError`."""
    import pyarrow
    import pyarrow.compute

    for part in path[len(name) + 1 :].split(".") if path != name else ():
        try:
            if part.isdecimal():
                column = pyarrow.compute.list_element(column, int(part))
            else:
                column = pyarrow.compute.struct_field(column, part)
        except (pyarrow.ArrowException, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{where}: no field {path!r}, {part!r}: {reason}; set data.text_field") from None
    return column
