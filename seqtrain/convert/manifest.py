"""What a conversion with training has done already, so that it can resume where it was killed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import Manifest, sha256_of


@dataclass
class ConversionManifest(Manifest):
    """`manifest.json` in the folder of the training: what it is of, and which of its runs are done.

    `fingerprint`: what decides all that follows (hashes of source and recipe; the seed that random numbers and the
    order of the data follow from). `chosen`: the layers that stay and the scores they were chosen by. `runs`: by name,
    in their order, the hash of the weights each left, and what it reports.
    """

    error = CheckpointError
    remedy = "delete the folder to start the training again"

    # Older files call it `identity`.
    fingerprint: Annotated[dict[str, Any], Field(validation_alias=AliasChoices("fingerprint", "identity"))]
    chosen: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = 1
    folder: Path = field(default=Path(), kw_only=True)

    @classmethod
    def open(cls, folder: Path, fingerprint: dict[str, Any]) -> "ConversionManifest":
        """The manifest in `folder`, or a new one. Raises `ConfigError` where it is of something else."""
        file = folder / "manifest.json"
        found = cls.read(file) if file.is_file() else cls(fingerprint)
        found.folder = folder
        if differing := sorted(key for key in fingerprint if found.fingerprint.get(key) != fingerprint[key]):
            was, now = found.fingerprint.get(differing[0]), fingerprint[differing[0]]
            raise ConfigError(
                f"output_dir={folder.parent}: holds an unfinished conversion of another {differing[0]} "
                f"({was}, now {now}); use another output_dir"
            )
        return found

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in super().values().items() if key != "folder"}

    def choose(self, kept: Sequence[int], importance: list[float] | None) -> None:
        """Notes which layers stay."""
        self.chosen = {"kept": list(kept), "importance": importance}
        self._write()

    def done(self, name: str) -> bool:
        """Whether run `name` is finished. Raises `CheckpointError` if its weights are not what they were."""
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
        self.write(self.folder / "manifest.json")
