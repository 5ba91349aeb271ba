"""Files that may be compressed, read from their start to their end as if they were not."""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from seqtrain.errors import DataError

# What compressed files begin with; the first three are read.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
}
ENDINGS = ("", ".gz", ".zst", ".xz")


def compression(start: bytes) -> str:
    """The name of the format that a file which begins so is compressed in; empty for none that is known."""
    return next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), "")


@contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The text of `file`, whatever its name ends in, and the file itself, whose place tells how far it is read.

    What is wrong with the file while the block reads it becomes a `DataError`.
    """
    with file.open("rb") as raw:
        kind = compression(raw.read(8))
        raw.seek(0)
        try:
            yield _decompressed(kind, raw), raw
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            what = f"damaged {kind}" if kind else "can't be read"
            raise DataError(f"{file}: {what}, at byte {raw.tell()} or before: {error}") from None


def _decompressed(kind: str, raw: IO[bytes]) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    if kind == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw
