"""Files that must survive a crash, or be known to have: atomic, durable writes, checksums, manifests."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from seqtrain.errors import DataError, SeqtrainError

T = TypeVar("T")

# Bytes; what is larger is no record, index or config.
LARGEST_RECORD = 2**28


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A place next to `path` for a file or folder, which becomes `path` when the block ends; nothing is left on errors.

    So a reader sees what was there before or all that was written. `durable`: also after the machine has crashed.
    """
    # Processes of two machines may have the same number.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield unfinished
        if durable:
            publish(unfinished, path)
        else:
            os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        raise


def replace_file(file: Path, content: bytes, *, durable: bool = True) -> None:
    """Puts `content` in `file`, see `replacing`. A store does so by itself."""
    if not isinstance(file, Path):
        file.write_bytes(content)
        return
    with replacing(file, durable=durable) as unfinished:
        unfinished.write_bytes(content)


def place(name: str) -> Path:
    """The file or folder called so: on this machine, or `KIND://...` in a store that fsspec knows, as `s3://bucket/a`.

    A store's has the methods of `Path` that the functions here and the callers of `place` need.
    """
    if not in_store(name):
        return Path(name)
    from upath import UPath

    found: Any = UPath(name, use_listings_cache=False)
    return found


def in_store(name: str) -> bool:
    """Whether the place called so is in a store."""
    return "://" in name


def create_new(file: Path, content: bytes) -> bool:
    """Makes `file` unless it is there already; of all processes that try at once, one is told True.

    In a store by one conditional write (S3: `If-None-Match`).
    """
    try:
        if isinstance(file, Path):
            with file.open("xb") as opened:
                try:
                    opened.write(content)
                    opened.flush()
                except OSError:
                    # Of a full disk: half of it would be taken for all.
                    file.unlink()
                    raise
        else:
            file.fs.pipe_file(file.path, content, mode="create")
    except FileExistsError:
        return False
    sync(file)
    return True


def make_folder(path: Path) -> None:
    """Makes a folder, and those it is in, unless it is there; a store has none."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder with all that is in it; errors are passed over."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.fs.rm(path.path, recursive=True)


def make_new_folder(path: Path) -> bool:
    """Makes the folder `path` unless something is there already; of all that try at once, one is told True."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def publish(unfinished: Path, path: Path) -> None:
    """Gives a finished file or folder its name, once all of it is on disk; `path` may be a file, or must not exist."""
    for part in [*unfinished.rglob("*"), unfinished]:
        sync(part)
    os.replace(unfinished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes the content of a file durable, or the names in a folder; in a store they are."""
    if not isinstance(path, Path):
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256_of(file: Path) -> str:
    """The checksum of a whole file, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_range(file: Path, begin: int, end: int) -> bytes:
    """The bytes from `begin` to `end` of a file, or those of them that it has."""
    if not isinstance(file, Path):
        return file.fs.cat_file(file.path, start=begin, end=end)
    with file.open("rb", buffering=0) as opened:
        opened.seek(begin)
        found = bytearray()
        # Linux reads 2 GiB at once at most.
        while len(found) < end - begin and (part := opened.read(end - begin - len(found))):
            found += part
        return bytes(found)


def read_record(file: Path, *, limit: int = LARGEST_RECORD) -> bytes:
    """The content of a small file. Raises `OSError`, or `ValueError` for what is no file or larger than `limit`."""
    # A pipe would be waited for, a device read for ever.
    if file.exists() and not file.is_file():
        raise ValueError("is not a file")
    if (size := file.stat().st_size) > limit:
        raise ValueError(f"has {size} bytes, more than {limit}")
    return file.read_bytes()


def read_json(file: Path) -> Any:
    """What a small file of JSON holds. Raises `OSError`, or `ValueError` for what is none, or nested too deep."""
    try:
        return json.loads(read_record(file))
    except RecursionError:
        raise ValueError("is nested too deep") from None


def remembered(file: Path, kind: type[T], work: Callable[[], T]) -> T:
    """The JSON of this kind that `file` holds, or else what `work` gives, which is kept there for the next time.

    Of processes that work at one time, one is believed by all. Where nothing can be kept, each works.
    """

    def read() -> T | None:
        with suppress(OSError, ValueError):
            found = read_json(file)
            return found if isinstance(found, kind) else None
        return None

    if (known := read()) is not None:
        return known
    made = work()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        if create_new(file, content := json.dumps(made).encode()):
            return made
        if (others := read()) is not None:
            return others
        # What lies there is damaged.
        replace_file(file, content)
    return made


class Manifest:
    """Base of what a folder says of itself in a JSON file: typed, written atomically, refused where it is damaged.

    A subclass is a dataclass of values that JSON has, and of further such dataclasses.
    """

    # What is raised for a file that is missing or damaged, and what the user can do about it.
    error: ClassVar[type[SeqtrainError]] = DataError
    remedy: ClassVar[str]

    @classmethod
    def read(cls, file: Path) -> Self:
        """What `file` says. Raises `error`, naming the file and the place in it."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(read_json(file))
        except FileNotFoundError:
            reason = "missing"
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"damaged at {'.'.join(str(part) for part in first['loc']) or 'its start'}: {first['msg']}"
        except (OSError, ValueError) as error:
            reason = f"damaged: {error}"
        raise cls.error(f"{file}: {reason}; {cls.remedy}")

    def write(self, file: Path) -> None:
        """Puts it in `file`, atomically and durably."""
        replace_file(file, self.content())

    def content(self) -> bytes:
        """The file, as `write` writes it."""
        return (json.dumps(self.values(), indent=1) + "\n").encode("utf-8")

    def values(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)  # type: ignore[call-overload]
