"""What a conversion with training has done already, so that it can resume where it was killed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import Manifest, sha256_of

FORMAT = 1


@dataclass(frozen=True)
class Stored(Manifest):
    """The file of a `ConversionManifest`."""

    error = CheckpointError
    remedy = "delete the folder to start the training again"

    format: int
    identity: dict[str, Any]
    chosen: dict[str, Any]
    runs: dict[str, dict[str, Any]]


@dataclass
class ConversionManifest:
    """`manifest.json` in the folder of the training: what it is of, and which of its runs are done.

    `identity`: what decides all that follows (hashes of source and recipe, seed: the one thing random numbers and the
    order of the data follow from). `chosen`: the layers that stay and the scores they were chosen by. `runs`: by name,
    in their order, the hash of the weights each left, and what it reports.
    """

    folder: Path
    identity: dict[str, Any]
    chosen: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> "ConversionManifest":
        """The manifest in `folder`, or a new one. Raises `ConfigError` where it is of something else."""
        file = folder / "manifest.json"
        if not file.is_file():
            return cls(folder, identity)
        stored = Stored.read(file)
        found = cls(folder, stored.identity, stored.chosen, stored.runs)
        if differing := sorted(key for key in identity if found.identity.get(key) != identity[key]):
            was, now = found.identity.get(differing[0]), identity[differing[0]]
            raise ConfigError(
                f"output_dir={folder.parent}: holds an unfinished conversion of another {differing[0]} "
                f"({was}, now {now}); use another output_dir"
            )
        return found

    def choose(self, kept: tuple[int, ...], importance: list[float] | None) -> None:
        """Notes which layers stay."""
        self.chosen = {"kept": list(kept), "importance": importance}
        self._write()

    def done(self, name: str) -> bool:
        """Whether run `name` is finished, its weights being what they were. Raises `CheckpointError` if they aren't."""
        if name not in self.runs:
            return False
        file = self.weights(name)
        if not file.is_file() or sha256_of(file) != self.runs[name]["sha256"]:
            raise CheckpointError(f"{file}: is not what the manifest next to it says; remove {self.folder}")
        return True

    def finish(self, name: str, about: dict[str, Any]) -> None:
        """Notes that run `name` is finished and its weights are written."""
        self.runs[name] = about | {"sha256": sha256_of(self.weights(name))}
        self._write()

    def weights(self, name: str) -> Path:
        """The weights that run `name` leaves."""
        return self.folder / f"{name}.safetensors"

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        Stored(FORMAT, self.identity, self.chosen, self.runs).write(self.folder / "manifest.json")
