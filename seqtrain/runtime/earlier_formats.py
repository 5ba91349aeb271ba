"""Checkpoints of formats 1 and 2, to read: whole tensors, weights in one file and moments in one for each rank."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from seqtrain.errors import CheckpointError, DamagedError
from seqtrain.files import sha256_of
from seqtrain.runtime.slices import WEIGHT
from seqtrain.weights import open_weights

WEIGHTS = "model.safetensors"


class WholeTensors:
    """As `slices.SlicedTensors`; a file is checked as a whole when it is first read. Errors are `DamagedError`."""

    def __init__(self, folder: Path, hashes: Mapping[str, str]):
        self.folder, self._hashes = folder, hashes
        self._opened: dict[str, Any] = {}
        # Bytes read to be checked; what is taken of them lies in the cache.
        self.bytes = 0

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.folder / file
            if sha256_of(path) != self._hashes[file]:
                raise DamagedError(f"{self.folder}: {file} is damaged, its hash is not the manifest's")
            self.bytes += path.stat().st_size
            try:
                self._opened[file] = open_weights(path)
            except CheckpointError as error:
                raise DamagedError(str(error)) from None
        return self._opened[file]

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        opened = self._open(WEIGHTS)
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (not a dict)

    @cached_property
    def _moments(self) -> dict[str, str]:
        """The file of each `NAME:KEY`."""
        files = (file for file in self._hashes if file != WEIGHTS)
        return dict(chain.from_iterable(((key, file) for key in self._open(file).keys()) for file in files))  # noqa: SIM118

    @property
    def numbers(self) -> dict[str, float]:
        """What follows from the steps before, of a weight as of all: scalars in float64."""
        found = {}
        for key, file in self._moments.items():
            of = self._open(file).get_slice(key)
            if not of.get_shape() and of.get_dtype() == "F64":
                found[key.rpartition(":")[2]] = self._open(file).get_tensor(key).item()
        return found

    def has(self, name: str, key: str) -> bool:
        return f"{name}:{key}" in self._moments

    def range(self, name: str, key: str, begin: int, end: int) -> Tensor:
        full = name if key == WEIGHT else f"{name}:{key}"
        if key != WEIGHT and full not in self._moments:
            raise DamagedError(f"{self.folder}: there is no {full}")
        value: Tensor = self._open(WEIGHTS if key == WEIGHT else self._moments[full]).get_tensor(full)
        return value.reshape(-1)[begin:end]

    def states(self, name: str, numbers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}
        for key, file in self._moments.items():
            of, _, rest = key.rpartition(":")
            number, _, own = rest.partition(".")
            if of == name and own and number.isdecimal() and int(number) in numbers:
                found.setdefault(int(number), {})[own] = self._open(file).get_tensor(key)
        return found

    def verify(self) -> None:
        for file in self._hashes:
            self._open(file)
