"""Checkpoints that become visible only when whole, and are believed only while their hashes hold.

A checkpoint is a folder `step-00000100` with `model.safetensors`, one `optimizer-*.safetensors` per rank, and
`manifest.json`, which names every file with its size and hash. Ranks write into a hidden folder; when all have
finished, rank 0 writes the manifest and renames the folder. Nothing in it is a pickle, and nothing in it depends on the
number of ranks or the ZeRO stage. A folder whose name is not that of its manifest's step is somebody's copy, and left
alone.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from seqtrain.errors import CheckpointError, SeqtrainError
from seqtrain.files import Manifest, publish, sha256_of, sync
from seqtrain.initialization import Fill, materialize_all
from seqtrain.runtime.engine import Engine
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.optimizer_state import IN_TRAINING
from seqtrain.runtime.ranks import Ranks
from seqtrain.weights import check_finite, open_weights

log = logging.getLogger("seqtrain.runtime")

FORMAT = 2
# Fields that each format brought.
NEW_FIELDS = {2: ("epoch", "versions")}
# Packages whose versions decide the last bits of what is computed.
PACKAGES = ("seqtrain", "torch", "deepspeed", "numpy")
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


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
    """What the manifest vouches for of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest(Manifest):
    """What a checkpoint says of itself, signed.

    `trajectory`: what `resume.fingerprint` says of the run; `fingerprint`: its hash. `tracking_id`: the run of
    Weights & Biases that it logs to; empty without. `files`: those it vouches for. `sha256`: of everything else here.
    `epoch`: of the ranks that wrote it. `versions`: of the packages they ran on.
    """

    error = CheckpointError
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

    def signature(self) -> str:
        """What `sha256` must be."""
        later = [name for format, names in NEW_FIELDS.items() if format > self.format for name in names]
        return _digest({key: value for key, value in self.values().items() if key not in ("sha256", *later)})


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder and what its manifest says."""

    folder: Path
    manifest: CheckpointManifest

    @property
    def progress(self) -> Progress:
        return self.manifest.progress

    def weights(
        self, model: nn.Module, *, frozen: Collection[str] = (), others: Fill | None = None, training: bool = False
    ) -> Fill:
        """Gives the tensors of `model` the numbers they have here; those it does not hold `others`, None: nothing.

        `frozen`: names of parameters it does not hold. `training`: those it is trained on with, where the optimizer
        averages them for all other use. Raises `CheckpointError` naming the first tensor that doesn't fit.
        """
        stored = open_weights(self.folder / WEIGHTS)
        names = set(stored.keys())
        if differing := sorted(names ^ set(_held(model, frozen))):
            raise CheckpointError(f"{self.folder}: {differing[0]} is not in both the checkpoint and the model")
        states = self._optimizer_states() if training else ()
        trained = {name: state[IN_TRAINING] for name, state in states if IN_TRAINING in state}

        def fill(name: str, whole: Tensor, own: slice) -> None:
            if name not in names:
                if others is not None:
                    others(name, whole, own)
                return
            value = stored.get_tensor(name)
            if value.shape != whole.shape:
                came, wanted = list(value.shape), list(whole.shape)
                raise CheckpointError(f"{self.folder}: {name} has shape {came}, the model wants {wanted}")
            kept = whole.view(-1)[own]
            # Mapped from the file: what is not taken is not read.
            kept.copy_(value.view(-1)[own])
            check_finite(self.folder, name, kept)
            if name in trained:
                kept.copy_(trained[name].view(-1)[own])

        return fill

    def load_weights(self, model: nn.Module, *, frozen: Collection[str] = (), others: Fill | None = None) -> None:
        """Fills `model` in place, and gives it memory where it has none; see `weights`."""
        materialize_all(model, self.weights(model, frozen=frozen, others=others), torch.device("cpu"))

    def restore_optimizer(self, engine: Engine) -> None:
        """Gives the optimizer of `engine` the moments and the step count. All ranks call it."""
        if self.progress.taken:
            engine.optimizer_state.restore(self._optimizer_states(), steps_taken=self.progress.taken)

    def _optimizer_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """By weight, as `OptimizerState.own` named it; of a weight of several ranks each its part."""
        for file in self.manifest.files:
            if file == WEIGHTS:
                continue
            with open_weights(self.folder / file) as stored:
                names = sorted(key.rpartition(":")[::2] for key in stored.keys())  # noqa: SIM118
                for name, keys in groupby(names, key=itemgetter(0)):
                    yield name, {key: stored.get_tensor(f"{name}:{key}") for _, key in keys}


def save(
    engine: Engine,
    root: Path,
    progress: Progress,
    ranks: Ranks,
    lease: Lease,
    *,
    keep: int,
    fingerprint: dict[str, Any],
    tracking_id: str,
    frozen: Collection[str] = (),
    for_good: Callable[[int], bool] = lambda step: False,
) -> Path:
    """Writes a checkpoint below `root` and drops all but the newest `keep`. All ranks call it; returns its folder.

    `frozen`: names of weights that it does not hold. `for_good`: whether that of a step is never dropped.
    Raises on every rank: `CheckpointError` when one can't write, `FencedError` when another start has taken over.
    """
    folder = root / _name(progress.step)
    partial = root / f".{folder.name}.{lease.epoch}.partial"

    def everyone(work: Callable[[], Any], *, first_only: bool = False) -> list[Any]:
        """What `work` gives on each rank. What it raises on one is raised on all."""
        result: Any = None
        failed: SeqtrainError | None = None
        try:
            if ranks.first or not first_only:
                result = work()
        except (OSError, SafetensorError) as error:
            failed = CheckpointError(
                f"{partial}: can't be written: rank {ranks.rank}: {error}; older checkpoints are untouched"
            )
        except SeqtrainError as error:
            failed = error
        results, errors = zip(*ranks.gather((result, failed)), strict=True)
        for each in filter(None, errors):
            raise each
        return list(results)

    everyone(lambda: _clear(root, partial, lease), first_only=True)
    entries = {
        name: entry
        for each in everyone(lambda: _write_own(engine, partial, progress, ranks, frozen))
        for name, entry in each.items()
    }
    manifest = CheckpointManifest(
        FORMAT,
        progress,
        tracking_id,
        _digest(fingerprint),
        fingerprint,
        entries,
        sha256="",
        epoch=lease.epoch,
        versions=versions(),
    )
    everyone(lambda: _commit(manifest, partial, folder, lease), first_only=True)
    everyone(lambda: _drop_oldest(root, lease, keep=keep, for_good=for_good), first_only=True)
    return folder


def _clear(root: Path, partial: Path, lease: Lease) -> None:
    """Makes the hidden folder, and removes those that ranks which were killed while they saved have left."""
    lease.check()
    for path in root.glob(".step-*.partial"):
        if re.fullmatch(r"\.step-\d{8,}(\.\d+)?\.partial", path.name) and path.is_dir():
            shutil.rmtree(path)
    partial.mkdir(parents=True)


def _commit(manifest: CheckpointManifest, partial: Path, folder: Path, lease: Lease) -> None:
    """Makes the checkpoint in `partial` visible as `folder`."""
    replace(manifest, sha256=manifest.signature()).write(partial / MANIFEST)
    lease.check()
    if folder.exists():
        # A damaged one, for a run resumes from the newest that is whole; or something else that has this name.
        if any(found.folder == folder for found in listed(folder.parent)):
            shutil.rmtree(folder)
        else:
            os.rename(folder, folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}"))
    publish(partial, folder)
    lease.note_saved(manifest.progress.step)
    log.info("checkpoint: %s", folder)


def _drop_oldest(root: Path, lease: Lease, *, keep: int, for_good: Callable[[int], bool]) -> None:
    for old in listed(root)[keep:]:
        if not for_good(old.progress.step):
            lease.check()
            shutil.rmtree(old.folder)


@cache
def versions() -> dict[str, str]:
    """Of the packages on which the last bits of a run depend."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _write_own(
    engine: Engine, partial: Path, progress: Progress, ranks: Ranks, frozen: Collection[str]
) -> dict[str, FileEntry]:
    """Writes this rank's files; gives their manifest entries. Nothing is written before the last exchange."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    # Gathering is a collective, so every rank walks over all weights and keeps its own.
    for name, whole in engine.weights(besides=frozen):
        if ranks.first:
            weights[name] = _kept(whole)
    if progress.taken:
        moments = {key: _kept(whole) for key, whole in engine.optimizer_state.own(ranks.rank, ranks.count)}
    if ranks.first:
        state = engine.module.state_dict()
        weights |= {name: _kept(state[name]) for name in _held(engine.module, frozen) if name not in weights}
    written = {}
    for name, tensors in {WEIGHTS: weights, f"optimizer-{ranks.rank:05d}.safetensors": moments}.items():
        if tensors:
            path = partial / name
            save_file(tensors, path)
            sync(path)
            written[name] = FileEntry(path.stat().st_size, sha256_of(path))
    return written


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _held(model: nn.Module, frozen: Collection[str]) -> list[str]:
    """Names of the tensors a checkpoint holds: parameters, each once however many modules share it, and buffers."""
    parameters = {name for name, _ in model.named_parameters()}
    every_parameter = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parameters -= set(frozen)
    return [name for name in model.state_dict() if name in parameters or name not in every_parameter]


def find(root: Path, *, but: Callable[[Checkpoint], bool] = lambda each: False) -> Checkpoint | None:
    """The newest checkpoint below `root` that is whole, or None. Warns about each newer one that is damaged.

    `but`: says which ones are passed over.
    """

    def skip(error: CheckpointError) -> None:
        log.warning("%s; trying the checkpoint before", error)

    for found in listed(root, damaged=skip):
        try:
            if not but(found):
                return read(found.folder)
        except CheckpointError as error:
            skip(error)
    return None


def listed(root: Path, *, damaged: Callable[[CheckpointError], None] = lambda error: None) -> list[Checkpoint]:
    """The checkpoints below `root` as their manifests tell, newest first; their files are not looked at.

    `damaged` is told of each whose manifest can't be read.
    """
    found = []
    for folder in root.glob("step-*") if root.is_dir() else ():
        if not (re.fullmatch(r"step-\d{8,}", folder.name) and folder.is_dir()):
            continue
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            damaged(error)
            continue
        if folder.name == _name(manifest.progress.step):
            found.append(Checkpoint(folder, manifest))
    return sorted(found, key=lambda each: (each.manifest.epoch, each.progress.step), reverse=True)


def latest(root: Path) -> Checkpoint | None:
    """The first of `listed`, or None."""
    return next(iter(listed(root)), None)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, each file checked against the manifest. Raises `CheckpointError`."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.bytes:
            came = "is missing" if size < 0 else f"has {size} bytes instead of {entry.bytes}"
            raise CheckpointError(f"{folder}: {name} {came}")
        if sha256_of(path) != entry.sha256:
            raise CheckpointError(f"{folder}: {name} is damaged, its hash is not the manifest's")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> CheckpointManifest:
    """What the manifest in `folder` says; the files it names are not looked at. Raises `CheckpointError`."""
    manifest = CheckpointManifest.read(folder / MANIFEST)
    if not 1 <= manifest.format <= FORMAT:
        raise CheckpointError(f"{folder}: has format {manifest.format}, this version reads those up to {FORMAT}")
    if manifest.sha256 != manifest.signature():
        raise CheckpointError(f"{folder}: {MANIFEST} was changed after it was written")
    if leading := [name for name in manifest.files if Path(name).name != name]:
        raise CheckpointError(f"{folder}: {MANIFEST} names the file {leading[0]!r}, which is not of that folder")
    return manifest


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
