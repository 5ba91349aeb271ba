"""Whether a run may train in a folder, and go on from what is there."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from seqtrain.config import read_run_config
from seqtrain.data import DataConfig, without_places
from seqtrain.data.config import WITHOUT_EFFECT
from seqtrain.errors import CheckpointError, ConfigError, FencedError
from seqtrain.files import place, replace_file
from seqtrain.models.config import ModelConfig, mixer_class
from seqtrain.models.source import open_source
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.lease import Lease, saved_step, take
from seqtrain.runtime.optimizers import used_options
from seqtrain.runtime.run_folder import RunFolder, as_record, plain, read_lines
from seqtrain.runtime.schedule import CONSTANT, ScheduleConfig, digest, learning_rate, plateau
from seqtrain.runtime.settings import PretrainConfig, micro_batch, segments
from seqtrain.validation import AUTO, validate

log = logging.getLogger("seqtrain.runtime")

# Keys of `train` that say in which pieces the same numbers are computed.
SEGMENTATION = ("micro_batch_size", "segment_tokens", "segment_gradients")
# Keys of `train` that change no number.
BESIDE = ("max_nonfinite_steps", "memory_budget", "offload_activations")
# Keys of `train` that checkpoints made before there were any don't have, and their defaults.
ADDED = (("compile", False), ("weights", "float32"))
# Keys of `model` that say what is computed twice: the numbers are the same bits.
RECOMPUTATION = ("activation_checkpointing", "recompute")
# Keys of `data` that say where text and tokenizer lie; `content` says what they are.
PLACES = ("path", "held_out_path", "tokenizer", "chat_template")
# What the config of every run has said.
SAID = (("model", "width"), ("data", "source"), ("optimizer", "lr"), ("schedule", "name"), ("train", "steps"))
# What a run without adapters says of them.
NO_LORA = {"rank": 0}


def fingerprint(
    config: PretrainConfig, content: Mapping[str, str] | None = None, norms: Sequence[float] = ()
) -> dict[str, Any]:
    """What decides which numbers come out, whoever computes them and in however many pieces.

    `content`: what `Corpus.content` says of the text and its tokenizer, where they have been read. With it comes the
    hash of the weights that adapters are for, which no checkpoint holds. `norms`: what `gradient_norms` gives.
    """
    values = {
        "model": _without_recomputation(plain(config.model)),
        "mixer": {name: plain(config.mixer[name]) for name in sorted(config.mixer)},
        "data": plain(config.data),
        "optimizer": used_options(config.optimizer),
        "schedule": plain(config.schedule),
        "train": plain(config.train),
        "seed": config.seed,
        "lora": plain(config.lora) if config.lora.rank else NO_LORA,
    }
    for key in WITHOUT_EFFECT:
        del values["data"][key]
    if content:
        values["data"]["content"] = dict(content)
        if config.lora.rank:
            values["lora"] = {**values["lora"], "source_sha256": open_source(config.source).sha256()}
    if norms:
        values["schedule"] |= {"from": "", "norms": digest(norms)}
    # Truncated gradients depend on where a row is cut into segments; exact ones don't.
    truncated = config.train.segment_gradients == "truncated" and segments(config) > 1
    pieces: tuple[str, ...] = () if truncated else SEGMENTATION
    if config.model.router.balance:
        # It is a micro-batch's.
        pieces = tuple(key for key in pieces if key != "micro_batch_size")
        values["train"]["micro_batch_size"] = micro_batch(config)
    if config.parallel.wire != "float32":
        values["train"]["wire"] = config.parallel.wire
    if config.kernels.linear not in (AUTO, "torch"):
        values["kernels"] = {"linear": config.kernels.linear}
    for key in (*BESIDE, *pieces):
        del values["train"][key]
    for key, default in ADDED:
        if values["train"][key] == default:
            del values["train"][key]
    return _without_unused(values)


def _without_recomputation(model: Mapping[str, Any]) -> dict[str, Any]:
    exact = model.get("recompute_inputs", "float32") == "float32" or not any(model[key] for key in RECOMPUTATION)
    dropped = (*RECOMPUTATION, "recompute_inputs") if exact else RECOMPUTATION
    return {key: value for key, value in model.items() if key not in dropped}


def _without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without keys that have no effect: they had other defaults once, or were not there."""
    schedule = dict(values.get("schedule", {}))
    if schedule.get("name") != "wsd":
        schedule.pop("decay_fraction", None)
    if schedule.get("name") != "refined" or not (schedule.get("from") or schedule.get("norms")):
        schedule = {key: value for key, value in schedule.items() if key not in ("from", "norm")}
    train = dict(values.get("train", {}))
    if not train.get("batch_warmup"):
        train = {key: value for key, value in train.items() if key not in ("batch_warmup", "batch_warmup_steps")}
    kept = {"schedule": schedule, "train": train}
    return {**values, **{key: value for key, value in kept.items() if value}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, steps_done: int = 0) -> list[str]:
    """`key=BEFORE, now AFTER` for every value in which two fingerprints differ.

    A schedule that gave the `steps_done` first steps the same learning rates is no difference: so a run is made longer.
    Neither are more steps where both have their peak rate after these. Nor is another place of the same text or
    tokenizer.
    """
    before, now = _without_places(_with_defaults(before, now), now), _without_places(now, before)
    if steps_done and _learning_rates(before, steps_done) == _learning_rates(now, steps_done) != []:
        before = {
            **before,
            "schedule": now["schedule"],
            "train": before["train"] | {"steps": now["train"]["steps"]},
            "optimizer": before["optimizer"] | {"lr": now["optimizer"]["lr"]},
        }
    elif steps_done and _longer(before, now) and all(_on_plateau(each, steps_done) for each in (before, now)):
        before = {**before, "train": before["train"] | {"steps": now["train"]["steps"]}}
    return list(_differences(before, now, ""))


def _with_defaults(values: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any]:
    """A fingerprint with what keys of `now` say that were added after it was taken: their defaults."""
    found = dict(values)
    if "lora" in now:
        found.setdefault("lora", NO_LORA)
    if "data" in now and "data" in found:
        defaults = plain(DataConfig())
        found["data"] = {key: defaults[key] for key in now["data"] if key in defaults} | found["data"]
    with suppress(ConfigError):
        if "model" in found:
            found["model"] = _without_recomputation(plain(validate(ModelConfig, found["model"])))
        if "mixer" in found:
            mixers = found["mixer"].items()
            found["mixer"] = {name: plain(validate(mixer_class(name).Config, own)) for name, own in mixers}
    return found


def _without_places(values: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` without the places of what both know the content of; without the content where only one knows it."""
    data = dict(values.get("data", {}))
    if data.get("content") and dict(other.get("data", {})).get("content"):
        data = _unplaced(data)
    else:
        data.pop("content", None)
    return {**values, "data": data} if "data" in values else values


def _unplaced(data: Mapping[str, Any]) -> dict[str, Any]:
    """The section `data` without the keys, also of sources of a mixture, that say where text and tokenizer lie."""
    kept = {key: value for key, value in data.items() if key not in PLACES}
    return kept | ({"sources": without_places(kept["sources"])} if "sources" in kept else {})


def _longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether `now` asks for more steps at a constant rate than `before`."""
    names = {each.get("schedule", {}).get("name") for each in (before, now)}
    return len(names) == 1 and names <= set(CONSTANT) and now["train"]["steps"] > before["train"]["steps"]


def _on_plateau(fingerprint: Mapping[str, Any], step: int) -> bool:
    first, last = plateau(validate(ScheduleConfig, fingerprint["schedule"]), fingerprint["train"]["steps"])
    return first <= step <= last


def put_off(checkpoint: checkpoints.Checkpoint, now: Mapping[str, Any]) -> bool:
    """Whether `checkpoint` lies in a decay that a run with the fingerprint `now`, a longer one, begins later."""
    before = checkpoint.manifest.trajectory
    if not _longer(before, now):
        return False
    _, last = plateau(validate(ScheduleConfig, before["schedule"]), before["train"]["steps"])
    return checkpoint.progress.step > last


def newest_of(root: Path, now: Mapping[str, Any]) -> checkpoints.Checkpoint | None:
    """The checkpoint below `root`, by the manifests, that a run with the fingerprint `now` goes on from."""
    found = checkpoints.listed(root)
    return next((each for each in found if not put_off(each, now)), next(iter(found), None))


def _learning_rates(fingerprint: Mapping[str, Any], count: int) -> list[float]:
    """Those of the first steps; none where more than the fingerprint decides them."""
    if "norms" in fingerprint["schedule"]:
        return []
    schedule, steps = validate(ScheduleConfig, fingerprint["schedule"]), fingerprint["train"]["steps"]
    peak = fingerprint["optimizer"]["lr"]
    return [learning_rate(schedule, peak=peak, steps=steps, step=step) for step in range(min(count, steps))]


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield f"{key}={json.dumps(before)}, now {json.dumps(now)}"
        return
    for name in [*before, *(name for name in now if name not in before)]:
        yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)


def refuse_foreign(folder: RunFolder, config: PretrainConfig) -> None:
    """Raises `ConfigError` where `folder` holds another run, or any run though `checkpoint.resume=never`."""
    resume = config.checkpoint.resume
    if not (folder.config.exists() and (folder.metrics.exists() or folder.checkpoints.exists())):
        if resume not in ("auto", "never") and not place(resume).is_dir():
            raise CheckpointError(
                f"checkpoint.resume={resume}: no such folder; use auto, never or a checkpoint's folder"
            )
        return
    now = fingerprint(config)
    # Whether they are the same text and tokenizer is known when they have been read.
    now["data"] = _unplaced(now["data"])
    # `auto` resumes whatever is there, also a run that began from another's checkpoint.
    if resume not in ("auto", "never"):
        now["checkpoint"] = {"resume": resume}
    before = read_run_config(folder.path, key="output_dir")
    for section, key in SAID:
        if not isinstance(before.get(section), dict) or key not in before[section]:
            raise ConfigError(
                f"output_dir={folder.path}: config.yaml is damaged: lacks {section}.{key}; put it back, or name "
                "another folder"
            )
    before["data"] = _unplaced(before["data"])
    before = _same_keys(before, now)
    newest = newest_of(folder.checkpoints, now)
    if found := differences(before, now, steps_done=newest.progress.step if newest else 0):
        recipe = f", or start a new run from its weights: output_dir=NEW checkpoint.resume={newest and newest.folder}"
        raise ConfigError(
            f"output_dir={folder.path}: holds a run with {'; '.join(found)}; resume it with these values as they were"
            + (recipe if newest else "")
        )
    if resume == "never":
        raise ConfigError(
            f"output_dir={folder.path}: holds a run already; use checkpoint.resume=auto to resume it, "
            "or another output_dir"
        )


@contextmanager
def claimed(folder: RunFolder, session: str, *, lease_seconds: float, began: Path) -> Iterator[Lease]:
    """The driver's lease of `folder`, which is made, until the block ends.

    Raises `ConfigError` where another start holds it, or nothing can be written. Where the folder held nothing and the
    block raises before there is a `began`, nothing is left.
    """
    made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        empty = made or not any(folder.path.iterdir())
        folder.path.mkdir(parents=True, exist_ok=True)
        for part in (folder.path, folder.checkpoints):
            if isinstance(part, Path) and (part == folder.path or part.exists()):
                tempfile.TemporaryFile(dir=part).close()
        store = None if folder.kept is folder.path else folder.kept_epochs
        lease = take(folder.epochs, session, seconds=lease_seconds, wait=log.warning, store=store)
        folder.copy_back()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"output_dir={folder.path}: can't be written ({reason}); choose another") from None
    try:
        with lease.renewed():
            yield lease
    except BaseException:
        with suppress(FencedError, OSError):
            # What another start has made of it since is not this one's to remove.
            lease.check()
            if empty and not began.exists():
                shutil.rmtree(folder.path, ignore_errors=True)
                for path in made[1:]:
                    path.rmdir()
        raise
    finally:
        lease.release()


def begin(folder: RunFolder, config: PretrainConfig) -> None:
    """Writes the config into a folder that is claimed, and mends what a crash or a hand has left of its records."""
    for leftover in folder.path.glob(".*.partial"):
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    for file in (folder.metrics, folder.starts):
        _mend(file)
    replace_file(folder.config, yaml.safe_dump(plain(config), sort_keys=False).encode())


def _mend(file: Path) -> None:
    """Leaves the lines of `file` that are whole records of a step."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n") and as_record(line) is not None]
    if len(whole) < len(lines):
        log.warning("%s: %d lines were damaged and are left out now", file, len(lines) - len(whole))
        replace_file(file, b"".join(whole))


def check_resumable(folder: RunFolder, config: PretrainConfig, now: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where the run can't go on from what the manifests in `folder` tell.

    `now`: the run's fingerprint. Says on the log what is missing that a run goes on without.
    """
    newest = newest_of(folder.checkpoints, now)
    resume = config.checkpoint.resume
    if newest:
        check_fits(newest.folder, newest.manifest.trajectory, now, steps_done=newest.progress.step)
    else:
        refuse_lost_checkpoints(folder)
        if folder.metrics.exists() and folder.metrics.stat().st_size:
            log.warning("output_dir=%s: no checkpoint had been written yet; it starts over from step 0", folder.path)
    if newest is None and resume not in ("auto", "never"):
        newest = checkpoints.Checkpoint(place(resume), checkpoints.read_manifest(place(resume)))
    if newest is None:
        return
    step, steps = newest.progress.step, config.train.steps
    if step > steps or (step == steps and newest.folder.parent != folder.checkpoints):
        raise CheckpointError(
            f"{newest.folder}: holds step {step} already, so train.steps={steps} leaves nothing to train; steps are "
            f"counted from the first run's start: name more, as in train.steps={step + max(steps, 1)}"
        )
    there = checkpoints.versions()
    before = newest.manifest.versions.items()
    if changed := "; ".join(f"{name} {was}, now {there.get(name)}" for name, was in before if there.get(name) != was):
        log.warning("%s: was made with %s; the last bits of the losses may differ", newest.folder, changed)
    if newest.folder.parent == folder.checkpoints:
        _warn_of_lost_metrics(folder, step)
        if (last := checkpoints.latest(folder.checkpoints)) and last.progress.step > step:
            log.warning(
                "train.steps=%d: goes on from step %d, before the decay of the shorter run; those after it, up to %d, "
                "are done again",
                steps,
                step,
                last.progress.step,
            )


def refuse_lost_checkpoints(folder: RunFolder) -> None:
    """Raises `CheckpointError` where checkpoints had been written, and none is there that is whole."""
    if step := saved_step(folder.kept_epochs):
        raise CheckpointError(
            f"{folder.checkpoints}: a checkpoint of step {step} had been written, and none that is whole is left; put "
            f"one back, or start over: another output_dir, or rm -r {folder.path}"
        )


def what_is_kept(folder: RunFolder) -> str:
    """Of a run that ended before its end, and how it goes on."""
    newest = checkpoints.latest(folder.checkpoints)
    if newest is None:
        return "nothing had been saved yet"
    return f"step {newest.progress.step} is saved, and the same command with output_dir={folder.path} goes on from it"


def _warn_of_lost_metrics(folder: RunFolder, step: int) -> None:
    starts = read_lines(folder.starts)
    first = starts[0]["step"] if starts else 0
    missing = set(range(first + 1, step + 1)) - {record["step"] for record in read_lines(folder.metrics)}
    if missing:
        log.warning("%s: lines of %d steps are lost, the first of step %d", folder.metrics, len(missing), min(missing))


def _same_keys(values: Any, like: Any) -> Any:
    """`values` without the keys that `like` doesn't have."""
    if not (isinstance(values, dict) and isinstance(like, dict)):
        return values
    return {key: _same_keys(values[key], like[key]) for key in values if key in like}


def check_fits(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any], *, steps_done: int = 0) -> None:
    """Raises `CheckpointError` naming all in which the fingerprint of the checkpoint in `folder` isn't this run's."""
    if found := differences(_without_unused(stored), now, steps_done=steps_done):
        raise CheckpointError(
            f"{folder}: was made with {'; '.join(found)}; use the same values, or start a new run from its weights: "
            f"output_dir=NEW checkpoint.resume={folder}"
        )
