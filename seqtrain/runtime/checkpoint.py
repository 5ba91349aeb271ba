"""Checkpoints that become visible only when whole, and are believed only while their hashes hold.

A checkpoint is a folder `step-00000100` with a file of slices for each rank, `rank-00000.EPOCH.safetensors`, and
`manifest.json`, which names every file with its size and hash, and what it holds. Ranks write their files each for
itself (see `saving`); a checkpoint is one from the moment its manifest is created. Nothing in it is a pickle, and
nothing in it depends on the number of ranks or the ZeRO stage. A folder whose name is not that of its manifest's step
is somebody's copy, and left alone.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.errors import CheckpointError, DamagedError, FencedError
from seqtrain.files import Manifest, create_new, sync
from seqtrain.initialization import Fill, materialize_all
from seqtrain.runtime.earlier_formats import WholeTensors
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.slices import WEIGHT, Contents, SlicedTensors
from seqtrain.weights import check_finite

log = logging.getLogger("seqtrain.runtime")

FORMAT = 3
# Fields that each format brought.
NEW_FIELDS = {2: ("epoch", "versions"), 3: ("shapes", "contents", "numbers")}
# Packages whose versions decide the last bits of what is computed.
PACKAGES = ("seqtrain", "torch", "deepspeed", "numpy")
MANIFEST = "manifest.json"
# What a rank writes: its slices, and a note that they are whole.
OF_RANK = re.compile(r"\.?rank-\d{5,}\.(\d+)\.(safetensors|json)(\..*\.partial)?")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all of its state that isn't in weights and moments."""

    # Steps done, skipped ones included; also the index of the next step.
    step: int = 0
    # Steps that changed the weights.
    taken: int = 0
    # Skipped steps since the last one taken.
    skipped_in_a_row: int = 0
    # Training tokens seen, all ranks together.
    tokens: int = 0

    @property
    def skipped(self) -> int:
        """Steps left out for a loss or gradient that wasn't finite."""
        return self.step - self.taken

    def after(self, *, taken: bool, tokens: int) -> "Progress":
        """The progress one step later."""
        return replace(
            self,
            step=self.step + 1,
            taken=self.taken + taken,
            skipped_in_a_row=0 if taken else self.skipped_in_a_row + 1,
            tokens=self.tokens + tokens,
        )


@dataclass(frozen=True)
class FileEntry:
    """What the manifest vouches for of a file. `sha256`: of slices, what `write_slices` gives."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest(Manifest):
    """What a checkpoint says of itself, signed.

    `trajectory`: what `resume.fingerprint` says of the run; `fingerprint`: its hash. `tracking_id`: the run of
    Weights & Biases that it logs to; empty without. `files`: those it vouches for. `sha256`: of everything else here.
    `epoch`: of the ranks that wrote it. `versions`: of the packages they ran on. `shapes`: of the tensors it holds, by
    name; `contents`: what of them is in each file. `numbers`: of the optimizer, besides moments.
    """

    error = DamagedError
    remedy = "so the checkpoint is incomplete"

    format: int
    progress: Progress
    tracking_id: str
    fingerprint: str
    trajectory: dict[str, Any]
    files: dict[str, FileEntry]
    sha256: str
    epoch: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    contents: dict[str, Contents] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def signature(self) -> str:
        """What `sha256` must be."""
        later = [name for format, names in NEW_FIELDS.items() if format > self.format for name in names]
        return digest({key: value for key, value in self.values().items() if key not in ("sha256", *later)})


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and what its manifest says."""

    folder: Path
    manifest: CheckpointManifest

    @property
    def progress(self) -> Progress:
        return self.manifest.progress

    def tensors(self) -> SlicedTensors | WholeTensors:
        """Reads what it holds, and counts the bytes."""
        hashes = {file: entry.sha256 for file, entry in self.manifest.files.items()}
        if self.manifest.format < 3:
            return WholeTensors(self.folder, hashes)
        manifest = self.manifest
        return SlicedTensors(self.folder, hashes, manifest.shapes, manifest.contents, manifest.numbers)

    def check_files(self) -> None:
        """Raises `DamagedError` for a file that is missing or of another size."""
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != entry.bytes:
                came = "is missing" if size < 0 else f"has {size} bytes instead of {entry.bytes}"
                raise DamagedError(f"{self.folder}: {name} {came}")

    def verify(self) -> None:
        """Raises `DamagedError` where anything of it is not what the manifest says; reads all of it."""
        self.check_files()
        self.tensors().verify()

    def check_names(self, names: Collection[str], model: nn.Module, frozen: Collection[str]) -> None:
        """Raises `CheckpointError` where it holds other tensors, `names`, than `model` has."""
        if differing := sorted(set(names) ^ set(held(model, frozen))):
            raise CheckpointError(f"{self.folder}: {differing[0]} is not in both the checkpoint and the model")

    def check_shape(self, name: str, came: Collection[int], wanted: Collection[int]) -> None:
        """Raises `CheckpointError` where they differ."""
        if list(came) != list(wanted):
            raise CheckpointError(f"{self.folder}: {name} has shape {list(came)}, the model wants {list(wanted)}")

    def load_weights(self, model: nn.Module, *, frozen: Collection[str] = (), others: Fill | None = None) -> None:
        """Fills `model`, whole and in this process, and gives it memory where it has none.

        `frozen`: names of parameters it does not hold. `others`: fills those; None: nothing does. Weights alone are
        read, and checked as they are. Raises `CheckpointError` naming the first tensor that doesn't fit.
        """
        self.check_files()
        tensors = self.tensors()
        self.check_names(tensors.shapes, model, frozen)

        def fill(name: str, whole: Tensor, own: slice) -> None:
            if name in tensors.shapes:
                self.check_shape(name, tensors.shapes[name], whole.shape)
                value = tensors.range(name, WEIGHT, 0, whole.numel())
                check_finite(self.folder, name, value)
                whole.view(-1).copy_(value)
            elif others is not None:
                others(name, whole, own)

        materialize_all(model, fill, torch.device("cpu"))

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights and buffers, whole."""
        self.check_files()
        tensors = self.tensors()
        sizes = {name: torch.Size(shape) for name, shape in tensors.shapes.items()}
        return {name: tensors.range(name, WEIGHT, 0, size.numel()).view(size) for name, size in sizes.items()}


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def clear(root: Path, lease: Lease, *, step: int) -> None:
    """Removes what ranks that ended while they saved have left, but for the save of `step` that has begun now."""
    lease.check()
    for folder in _folders(root):
        whole, begun = (folder / MANIFEST).exists(), folder == folder_of(root, step)
        for path in folder.iterdir():
            found = OF_RANK.fullmatch(path.name)
            if (
                found
                and not (whole and path.suffix == ".safetensors")
                and not (begun and int(found[1]) == lease.of_checkpoints.epoch)
            ):
                path.unlink(missing_ok=True)
        if not whole and not begun:
            _remove_empty(folder)


def commit(manifest: CheckpointManifest, folder: Path, lease: Lease) -> None:
    """Makes a checkpoint of the files that `manifest` names, which are in `folder`. Raises `FencedError`."""
    content, there = replace(manifest, sha256=manifest.signature()).content(), folder / MANIFEST
    while True:
        lease.check()
        if create_new(there, content):
            break
        # That of a damaged one, or of a decay that is put off: a run resumes from those before.
        with suppress(DamagedError):
            if read_manifest(folder).epoch > lease.of_checkpoints.epoch:
                raise FencedError(f"{folder}: was written by a later start, so this one ends here")
        there.unlink(missing_ok=True)
    sync(folder)
    sync(folder.parent)
    for path in folder.iterdir():
        if OF_RANK.fullmatch(path.name) and path.name not in manifest.files:
            path.unlink()
    lease.of_checkpoints.note_saved(manifest.progress.step)


def drop_oldest(root: Path, lease: Lease, *, keep: int, for_good: Callable[[int], bool]) -> None:
    """Removes all but the newest `keep`. `for_good`: whether that of a step stays."""
    for old in listed(root)[keep:]:
        if not for_good(old.progress.step):
            lease.check()
            # First, so that it is none any more.
            (old.folder / MANIFEST).unlink()
            for path in old.folder.iterdir():
                if path.name in old.manifest.files or OF_RANK.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            _remove_empty(old.folder)


def _remove_empty(folder: Path) -> None:
    """Removes it, unless somebody else has put something there."""
    with suppress(OSError):
        folder.rmdir()


@cache
def versions() -> dict[str, str]:
    """Of the packages on which the last bits of a run depend."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def held(model: nn.Module, frozen: Collection[str]) -> list[str]:
    """Names of the tensors a checkpoint holds: parameters, each once however many modules share it, and buffers."""
    parameters = {name for name, _ in model.named_parameters()}
    every_parameter = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parameters -= set(frozen)
    return [name for name in model.state_dict() if name in parameters or name not in every_parameter]


def candidates(root: Path) -> Iterator[Checkpoint]:
    """The checkpoints below `root`, newest first, whose files are all there. Warns about each that is damaged."""
    for found in listed(root, damaged=_pass_over):
        try:
            found.check_files()
        except DamagedError as error:
            _pass_over(error)
            continue
        yield found


def _pass_over(error: CheckpointError) -> None:
    log.warning("%s; trying the checkpoint before", error)


def find(root: Path, use: Callable[[Checkpoint], None] = Checkpoint.verify) -> Checkpoint | None:
    """The newest checkpoint below `root` that is whole, or None. Warns about each newer one that is damaged.

    `use`: does with it what is to be done, and raises `DamagedError` where it is not whole.
    """
    for found in candidates(root):
        try:
            use(found)
        except DamagedError as error:
            _pass_over(error)
        else:
            return found
    return None


def _folders(root: Path) -> list[Path]:
    found = root.glob("step-*") if root.is_dir() else ()
    return [folder for folder in found if re.fullmatch(r"step-\d{8,}", folder.name) and folder.is_dir()]


def listed(root: Path, *, damaged: Callable[[CheckpointError], None] = lambda error: None) -> list[Checkpoint]:
    """The checkpoints below `root` as their manifests tell, newest first; their files are not looked at.

    `damaged` is told of each whose manifest can't be read.
    """
    found = []
    for folder in _folders(root):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            damaged(error)
            continue
        if folder == folder_of(root, manifest.progress.step):
            found.append(Checkpoint(folder, manifest))
    return sorted(found, key=lambda each: (each.manifest.epoch, each.progress.step), reverse=True)


def latest(root: Path) -> Checkpoint | None:
    """The first of `listed`, or None."""
    return next(iter(listed(root)), None)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, whose files are all there. Raises `CheckpointError`."""
    found = Checkpoint(folder, read_manifest(folder))
    found.check_files()
    return found


def read_manifest(folder: Path) -> CheckpointManifest:
    """What the manifest in `folder` says; the files it names are not looked at. Raises `CheckpointError`."""
    manifest = CheckpointManifest.read(folder / MANIFEST)
    if not 1 <= manifest.format <= FORMAT:
        raise CheckpointError(f"{folder}: has format {manifest.format}, this version reads those up to {FORMAT}")
    if manifest.sha256 != manifest.signature():
        raise DamagedError(f"{folder}: {MANIFEST} was changed after it was written")
    if leading := [name for name in manifest.files if Path(name).name != name]:
        raise CheckpointError(f"{folder}: {MANIFEST} names the file {leading[0]!r}, which is not of that folder")
    return manifest


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
