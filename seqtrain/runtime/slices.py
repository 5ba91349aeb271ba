"""Files of slices: each rank's own stretches of flattened tensors, in one safetensors file that is checked in blocks.

A rank holds contiguous stretches of weights and moments, whatever divides them: all of a tensor, ZeRO's cuts, a share
where several ranks hold the same. `NAME:KEY` in its file is a stretch, one-dimensional; where it begins, and in which
part of the tensor, the checkpoint's manifest says. The last tensor of a file, `sha256`, has a hash for each block of
the others, so that who reads a range checks that range, and what is written is hashed as it goes by.

Not torch.distributed.checkpoint: its `.metadata` is a pickle and its files have no hashes; its optimizer states need
each rank's view of the whole (`DTensor`), which DeepSpeed's stretches are not; and before it writes, a plan of every
tensor of every rank is gathered at rank 0, where a stretch is known to its rank alone.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from seqtrain.errors import DamagedError
from seqtrain.files import read_range

# As safetensors call them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
# The key of a weight's own numbers, and the name of the hashes.
WEIGHT, HASHES = "weight", "sha256"
# Bytes of a hash; of the smallest and the largest block; blocks that a tensor has between the two.
HASH, SMALLEST, LARGEST, BLOCKS = 32, 2**11, 2**18, 256
# Bytes; no header is larger.
LARGEST_HEADER = 2**28

# A dimension, and the places along it where a part lies, each from a place to a place, in rising order.
Cut = tuple[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor: a stretch from `begin` on of the flattened part that `cuts` tell, or of the whole.

    `values`: by key, each flat and equally long.
    """

    name: str
    begin: int
    values: dict[str, Tensor]
    cuts: list[Cut] = field(default_factory=list)


@dataclass(frozen=True)
class Contents:
    """What a file of slices holds. `states`: names of weights of which it has states of whole matrices."""

    # By name of the tensor: first number and the one after the last.
    slices: dict[str, tuple[int, int]]
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)


class Parts:
    """Where the numbers of a part, flattened, lie in the flattened whole of `shape`."""

    def __init__(self, shape: Sequence[int], cuts: Sequence[Cut]):
        """Raises `ValueError` for cuts that no part of such a whole has."""
        tables, sizes = {}, list(shape)
        for dim, places in cuts:
            ends = [end for place in places for end in place]
            if not (
                0 <= dim < len(shape) and ends == sorted(ends) and ends and ends[0] >= 0 and ends[-1] <= shape[dim]
            ):
                raise ValueError(f"{shape} has no part {dim, places}")
            tables[dim] = torch.cat([torch.arange(begin, end) for begin, end in places])
            sizes[dim] = len(tables[dim])
        self.shape, self._whole, self._tables = tuple(sizes), tuple(shape), tables

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    def places(self, index: Tensor) -> Tensor:
        """Of those numbers of the part, int64, their places in the whole."""
        if not self._tables:
            return index
        found, stride = torch.zeros_like(index), 1
        for dim in reversed(range(len(self.shape))):
            place = index % self.shape[dim]
            found += stride * (self._tables[dim][place] if dim in self._tables else place)
            index, stride = index // self.shape[dim], stride * self._whole[dim]
        return found

    def first(self, place: int) -> int:
        """How many numbers of the part lie before `place` in the whole."""
        low, high = 0, self.numbers
        while self._tables and low < high:
            middle = (low + high) // 2
            if int(self.places(torch.tensor(middle))) < place:
                low = middle + 1
            else:
                high = middle
        return low if self._tables else min(place, high)


def block_bytes(size: int) -> int:
    """Bytes of a block of a tensor of so many: few enough for a range to be read without much around it."""
    return min(max(1 << max(size // BLOCKS - 1, 0).bit_length(), SMALLEST), LARGEST)


def _blocks(size: int) -> int:
    return -(-size // block_bytes(size)) if size else 0


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    at = hashes = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        told = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape)}
        entries[name] = {**told, "data_offsets": [at, at + size]}
        at, hashes = at + size, hashes + _blocks(size)
    entries[HASHES] = {"dtype": "U8", "shape": [hashes, HASH], "data_offsets": [at, at + HASH * hashes]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_slices(out: BinaryIO, tensors: Mapping[str, Tensor], go_on: Callable[[], None] = lambda: None) -> str:
    """Writes `tensors`, of this process's memory, hashed as they go by; gives the hash of header and hashes.

    `go_on`: called before each block.
    """
    header = _header(tensors)
    write_block(out, header)
    hashes = bytearray()
    for tensor in tensors.values():
        numbers: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        raw = memoryview(numbers)
        block = block_bytes(len(raw))
        for begin in range(0, len(raw), block):
            go_on()
            part = raw[begin : begin + block]
            hashes += hashlib.sha256(part).digest()
            write_block(out, part)
    write_block(out, hashes)
    return hashlib.sha256(header + hashes).hexdigest()


def _size(told: Mapping[str, Any]) -> int:
    """Bytes of one number of a tensor that a header tells of."""
    return DTYPES[told["dtype"]].itemsize


def write_block(out: BinaryIO, block: bytes | bytearray | memoryview) -> None:
    out.write(block)


class SlicesFile:
    """A file of slices to read from; `sha256`: what `write_slices` gave. Errors are `DamagedError`."""

    def __init__(self, path: Path, sha256: str):
        self.path, self._sha256 = path, sha256
        # So many bytes were read.
        self.bytes = 0

    @cached_property
    def _told(self) -> tuple[dict[str, Any], int, bytes]:
        """The header, where the data begin, and the hashes."""
        start = self._read(0, 8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > LARGEST_HEADER:
            raise self._damaged()
        text = self._read(8, 8 + size)
        try:
            entries = json.loads(text)
            begin, end = entries[HASHES]["data_offsets"]
            hashes = self._read(8 + size + begin, 8 + size + end)
            if hashlib.sha256(start + text + hashes).hexdigest() != self._sha256:
                raise self._damaged()
            del entries[HASHES]
            for told in entries.values():
                first, last = told["data_offsets"]
                if not 0 <= first <= last <= begin or math.prod(told["shape"], start=_size(told)) != last - first:
                    raise self._damaged()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, DamagedError):
                raise
            raise self._damaged() from None
        return entries, 8 + size, hashes

    @cached_property
    def _first_block(self) -> dict[str, int]:
        """By tensor, the number of its first block."""
        sizes = [end - begin for begin, end in (each["data_offsets"] for each in self._told[0].values())]
        return dict(zip(self._told[0], accumulate(map(_blocks, sizes), initial=0), strict=False))

    @property
    def names(self) -> list[str]:
        return list(self._told[0])

    def whole(self, name: str) -> Tensor:
        """All of a tensor, in its shape."""
        shape = self._told[0][name]["shape"]
        return self.range(name, 0, math.prod(shape)).view(shape)

    def range(self, name: str, begin: int, end: int) -> Tensor:
        """The numbers from `begin` to `end` of a flattened tensor."""
        entries, start, hashes = self._told
        if name not in entries:
            raise DamagedError(f"{self.path.parent}: {self.path.name} has no {name}")
        told = entries[name]
        dtype, (first, last) = DTYPES[told["dtype"]], told["data_offsets"]
        size, block = dtype.itemsize, block_bytes(last - first)
        low, high = begin * size // block, -(-end * size // block)
        raw = self._read(start + first + low * block, min(start + first + high * block, start + last))
        view, at = memoryview(raw), HASH * (self._first_block[name] + low)
        for number in range(high - low):
            expected = hashes[at + HASH * number : at + HASH * (number + 1)]
            if hashlib.sha256(view[number * block : (number + 1) * block]).digest() != expected:
                raise self._damaged()
        cut = view[begin * size - low * block : end * size - low * block]
        if len(cut) != (end - begin) * size:
            raise self._damaged()
        return torch.frombuffer(bytearray(cut), dtype=dtype) if len(cut) else torch.empty(0, dtype=dtype)

    def _read(self, begin: int, end: int) -> bytes:
        try:
            found = read_range(self.path, begin, end)
        except OSError as error:
            raise DamagedError(f"{self.path.parent}: {self.path.name} can't be read ({error})") from None
        self.bytes += len(found)
        return found

    def _damaged(self) -> DamagedError:
        return DamagedError(f"{self.path.parent}: {self.path.name} is damaged, its hashes are not the manifest's")


class SlicedTensors:
    """The tensors of a checkpoint, read from its ranks' files. Errors are `DamagedError`."""

    def __init__(
        self,
        folder: Path,
        hashes: Mapping[str, str],
        shapes: Mapping[str, list[int]],
        contents: Mapping[str, Contents],
        numbers: Mapping[str, float] | None = None,
    ):
        """`hashes`, `contents`: by file. `shapes`: of the whole tensors, by name. `numbers`: of the optimizer."""
        self.folder, self.shapes, self.numbers = folder, shapes, dict(numbers or {})
        # A manifest may tell of files that it does not vouch for.
        self._contents = {file: told for file, told in contents.items() if file in hashes}
        self._files = {file: SlicesFile(folder / file, sha256) for file, sha256 in hashes.items()}

    @property
    def bytes(self) -> int:
        """So many were read."""
        return sum(file.bytes for file in self._files.values())

    @cached_property
    def _holders(self) -> dict[str, list[tuple[str, int, int, list[Cut]]]]:
        """By tensor, the files that have some of it: which stretch, of which part."""
        found: dict[str, list[tuple[str, int, int, list[Cut]]]] = {name: [] for name in self.shapes}
        for file, told in self._contents.items():
            for name, (begin, end) in told.slices.items():
                if name in found:
                    found[name].append((file, begin, end, told.cuts.get(name, [])))
        return found

    def has(self, name: str, key: str) -> bool:
        """Whether there are numbers of a tensor under `key`."""
        holders = self._holders.get(name, [])
        return bool(holders) and f"{name}:{key}" in self._files[holders[0][0]].names

    def range(self, name: str, key: str, begin: int, end: int) -> Tensor:
        """Numbers `begin` to `end` of the flattened whole tensor."""
        out: Tensor | None = None
        covered = 0
        try:
            for file, first, last, cuts in self._holders[name]:
                part = Parts(self.shapes[name], cuts)
                low, high = max(first, part.first(begin)), min(last, part.first(end))
                if low >= high:
                    continue
                values = self._files[file].range(f"{name}:{key}", low - first, high - first)
                out = torch.empty(end - begin, dtype=values.dtype) if out is None else out
                if cuts:
                    out[part.places(torch.arange(low, high)) - begin] = values
                else:
                    out[low - begin : high - begin] = values
                covered += high - low
        except (IndexError, ValueError, RuntimeError) as error:
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(f"{self.folder}: {name} can't be put together ({error})") from None
        if covered != end - begin:
            raise DamagedError(f"{self.folder}: {name} is incomplete, {covered} of {end - begin} numbers are there")
        return torch.empty(0) if out is None else out

    def states(self, name: str, numbers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Of a weight of matrices, by number of the matrix, the state of each that is asked for."""
        found: dict[int, dict[str, Tensor]] = {}
        for file, told in self._contents.items():
            for key in self._files[file].names if name in told.states else ():
                of, _, rest = key.rpartition(":")
                number, _, own = rest.partition(".")
                if of == name and number.isdecimal() and int(number) in numbers:
                    found.setdefault(int(number), {})[own] = self._files[file].whole(key)
        return found

    def verify(self) -> None:
        """Reads every block of every file."""
        for file in self._files.values():
            for name in file.names:
                file.whole(name)


def contents_of(pieces: Sequence[Piece], states: Mapping[str, Tensor]) -> Contents:
    """What a file of `pieces` and `states` (by `NAME:NUMBER.KEY`) holds."""
    return Contents(
        {piece.name: (piece.begin, piece.begin + len(next(iter(piece.values.values())))) for piece in pieces},
        {piece.name: piece.cuts for piece in pieces if piece.cuts},
        sorted({name.rpartition(":")[0] for name in states}),
    )


def named(pieces: Sequence[Piece]) -> Iterator[tuple[str, Tensor]]:
    """Their values by `NAME:KEY`."""
    for piece in pieces:
        for key, value in piece.values.items():
            yield f"{piece.name}:{key}", value
