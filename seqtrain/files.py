"""Files that must survive a crash, or be known to have: durable writes and checksums."""

import hashlib
import os
from pathlib import Path


def replace_file(file: Path, content: bytes) -> None:
    """Puts `content` in `file` atomically and durably."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with unfinished.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(unfinished, file)


def sync_folder(folder: Path) -> None:
    """Makes the names of the files in `folder` durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256_of(file: Path) -> str:
    """The checksum of a whole file, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
