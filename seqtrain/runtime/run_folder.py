"""The folder of a run: what lies where, whose it is, and what is logged there."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.runtime.schedule import ScheduleConfig, learning_rate
from seqtrain.runtime.settings import PretrainConfig, segments
from seqtrain.validation import validate

LOGGER = logging.getLogger("seqtrain")
# Keys of `train` that say in which pieces the same numbers are computed.
SEGMENTATION = ("micro_batch_size", "segment_tokens", "segment_gradients")


class RunFolder:
    """Paths below `output_dir`."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.loss_curve = path / "loss.png"
        self.log = path / "run.log"
        # One line each time the ranks began to train, with the step they began at.
        self.starts = path / "starts.jsonl"
        # How much of the current step is done.
        self.within = path / ".within.json"
        # Appears when the ranks are to save and stop.
        self.stop = path / ".stop"
        # What rank 0 hands back to the process that started it.
        self.outcome = path / ".outcome.json"
        # The first error of a rank that a restart would not cure.
        self.error = path / ".error.json"
        # Ray's own records of the run.
        self.ray = path / ".ray"


def plain(value: Any) -> Any:
    """`value`, a config dataclass or a dict of them, as dicts, lists and scalars."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return json.loads(json.dumps(asdict(value)))


def fingerprint(config: PretrainConfig) -> dict[str, Any]:
    """The part of `config` that decides which numbers come out, whoever computes them and in however many pieces."""
    values = {
        "model": plain(config.model),
        "mixer": {name: plain(config.mixer[name]) for name in sorted(set(config.model.layers))},
        "data": plain(config.data),
        "optimizer": plain(config.optimizer),
        "schedule": plain(config.schedule),
        "train": plain(config.train),
        "seed": config.seed,
    }
    for key in ("cache_dir", "verify", "shard_tokens"):
        del values["data"][key]
    # Truncated gradients depend on where a row is cut into segments; exact ones don't.
    truncated = config.train.segment_gradients == "truncated" and segments(config) > 1
    for key in ("max_nonfinite_steps", *(() if truncated else SEGMENTATION)):
        del values["train"][key]
    return _without_unused(values)


def _without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without `schedule.decay_fraction` where it has no effect: its default was another one once."""
    schedule = dict(values.get("schedule", {}))
    if schedule.get("name") != "wsd":
        schedule.pop("decay_fraction", None)
    return {**values, **({"schedule": schedule} if schedule else {})}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, steps_done: int = 0) -> list[str]:
    """`key=BEFORE, now AFTER` for every value in which two fingerprints differ.

    A schedule that gave the `steps_done` first steps the same learning rates is no difference: so a run is made longer.
    """
    if steps_done and _learning_rates(before, steps_done) == _learning_rates(now, steps_done):
        before = {
            **before,
            "schedule": now["schedule"],
            "train": before["train"] | {"steps": now["train"]["steps"]},
            "optimizer": before["optimizer"] | {"lr": now["optimizer"]["lr"]},
        }
    return list(_differences(before, now, ""))


def _learning_rates(fingerprint: Mapping[str, Any], count: int) -> list[float]:
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
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            raise CheckpointError(
                f"checkpoint.resume={resume}: no such folder; use auto, never or a checkpoint's folder"
            )
        return
    now = fingerprint(config)
    # `auto` resumes whatever is there, also a run that began from another's checkpoint.
    if resume not in ("auto", "never"):
        now["checkpoint"] = {"resume": resume}
    before = _same_keys(yaml.safe_load(folder.config.read_text()), now)
    # Not copies with names of their own, such as step-best.
    newest = max(folder.checkpoints.glob("step-" + 8 * "[0-9]"), default=None)
    steps_done = int(newest.name.removeprefix("step-")) if newest else 0
    if found := differences(before, now, steps_done=steps_done):
        raise ConfigError(
            f"output_dir={folder.path}: holds a run with {'; '.join(found)}; resume it with these values as they were"
            + (f", or start a new run from its weights: output_dir=NEW checkpoint.resume={newest}" if newest else "")
        )
    if resume == "never":
        raise ConfigError(
            f"output_dir={folder.path}: holds a run already; use checkpoint.resume=auto to resume it, "
            "or another output_dir"
        )


def claim(folder: RunFolder, config: PretrainConfig) -> None:
    """Makes `folder` this run's: writes its config, and clears what an earlier session left for its driver."""
    folder.path.mkdir(parents=True, exist_ok=True)
    for leftover in (folder.stop, folder.error, folder.outcome, folder.within):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(folder.ray, ignore_errors=True)
    folder.config.write_text(yaml.safe_dump(plain(config), sort_keys=False))


def _same_keys(values: Any, like: Any) -> Any:
    """`values` without the keys that `like` doesn't have."""
    if not (isinstance(values, dict) and isinstance(like, dict)):
        return values
    return {key: _same_keys(values[key], like[key]) for key in values if key in like}


def check_fits(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any], *, steps_done: int = 0) -> None:
    """Raises `CheckpointError` naming all in which the fingerprint of the checkpoint in `folder` isn't this run's."""
    if found := differences(_without_unused(stored), now, steps_done=steps_done):
        raise CheckpointError(f"{folder}: was made with {'; '.join(found)}; use the same values, or another output_dir")


def log_to(file: Path) -> None:
    """Appends everything the logger `seqtrain` and its children say to `file`; replaces an earlier file."""
    for handler in [h for h in LOGGER.handlers if isinstance(h, logging.FileHandler)]:
        LOGGER.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


def warn_on_stderr() -> None:
    """Shows warnings of `seqtrain` on stderr, one line each, unless someone has set up a handler for it already."""
    if any(isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler) for h in LOGGER.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
