"""Small configs, and processes that act as ranks, for the tests of the runtime."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

# Imported before ranks are forked, so that each doesn't import it again.
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch._inductor.compile_fx

from seqtrain.data import DataConfig, prepare
from seqtrain.mixers import MIXERS
from seqtrain.models import ModelConfig
from seqtrain.parallel.testing import RankError, rank_outcomes
from seqtrain.runtime.checkpoint import Checkpoint, find
from seqtrain.runtime.lease import newest, take
from seqtrain.runtime.ranks import this_process
from seqtrain.runtime.resume import begin
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.worker import Session, train

WORDS = ["state", "scan", "delta", "gate", "key", "value", "query", "chunk", "decay", "head", "token", "loss", "rank"]
# Seconds after which ranks that still run are taken for hung.
RANKS_SECONDS = 90
BETAS = (0.9, 0.95)
SMALL: dict[str, dict[str, Any]] = {
    "data": {"held_out": 0.2},
    "optimizer": {"lr": 1e-2, "betas": BETAS},
    "schedule": {"warmup_fraction": 0.1},
    "train": {"steps": 6, "sequence_length": 32, "batch_size": 8, "micro_batch_size": 2},
    "evaluation": {"every": 0},
    "parallel": {"data": 1},
    "runtime": {"name": "inline", "cpus_per_worker": 1, "lease_seconds": 0.4},
    "checkpoint": {"every": 3},
    "tracking": {"mode": "disabled"},
    "sample": {"prompt": "state", "tokens": 8},
}


def write_text(folder: Path) -> Path:
    """A folder with a few files of random words, the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(chance.choices(WORDS, k=400)))
    return folder


def short_documents(folder: Path) -> str:
    """Texts of 1 to 60 letters: some shorter than a convolution, some longer than a rank's part of a row."""
    folder.mkdir()
    for number in range(60):
        text = "state scan delta gate "[number % 7 :] * 3 if number % 3 else "abc"[: 1 + number % 2]
        (folder / f"{number:02d}.txt").write_text(text)
    return str(folder)


def small_config(root: Path, *layers: str, **sections: Any) -> PretrainConfig:
    """A run of a few seconds below `root`, of one block per mixer; `sections`: changes as in `change`."""
    layers = layers or ("linear_attention", "linear_attention")
    config = PretrainConfig(
        model=ModelConfig(layers=layers, depth=len(layers), width=16, heads=2),
        mixer={name: MIXERS.get(name).Config() for name in layers},
        data=DataConfig(source="text", path=str(write_text(root / "text")), cache_dir=str(root / "cache")),
        seed=1,
        output_dir=str(root / "out"),
    )
    return change(change(config, **SMALL), **sections)


def change(config: PretrainConfig, name: str = "", **sections: Any) -> PretrainConfig:
    """`config` with other values: `change(c, train={"steps": 3}, seed=2)`. `name`: of another output folder."""
    new = {key: replace(getattr(config, key), **v) if isinstance(v, dict) else v for key, v in sections.items()}
    changed = replace(config, **new)
    return replace(changed, output_dir=str(Path(config.output_dir).with_name(name))) if name else changed


def session_for(config: PretrainConfig, **told: Any) -> Session:
    """Prepares data and folder as the driver does; `told`: task and callback."""
    corpus = prepare(config.data, progress=False)
    folder, store = RunFolder(Path(config.output_dir), config.checkpoint.store), None
    if config.checkpoint.store:
        store = folder.kept_epochs
    lease = take(folder.epochs, "test", seconds=config.runtime.lease_seconds, store=store)
    folder.copy_back()
    told |= {"store_epoch": lease.store.epoch} if lease.store else {}
    session = Session(config, corpus.folder.resolve(), "test", lease.epoch, "", corpus.content, **told)
    begin(session.folder, config)
    return session


def train_on(*configs: PretrainConfig | Session, poll: Callable[[], None] = lambda: None) -> None:
    """Trains each on the ranks it asks for, and those that ask for equally many in one launch.

    Also a single rank is a process of its own: a group formed here would be in the way of later forks.
    """
    sessions = [each if isinstance(each, Session) else session_for(each) for each in configs]
    for count in sorted({session.config.parallel.ranks for session in sessions}):
        chosen = [session for session in sessions if session.config.parallel.ranks == count]
        on_ranks(count, lambda ranks, chosen=chosen: [train(session, ranks, poll=poll) for session in chosen] and None)
    for session in sessions:
        session.lease.release()


def on_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(ranks, *arguments)` in `count` forked processes that form a gloo group; their results, by rank.

    The first error that a rank raised is raised here, when all have come to their end; if a rank only died, that is.
    """
    outcomes = rank_outcomes(count, launched, count, work, arguments, limit=RANKS_SECONDS)
    failed = [outcome for outcome in outcomes if isinstance(outcome, RankError)]
    for outcome in failed:
        if outcome.error is not None:
            raise outcome.error from outcome
    if failed:
        raise failed[0]
    return outcomes


def launched(rank: int, count: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """`work(ranks, *arguments)` in a forked rank that sees of its launch what torchrun's do."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    return work(this_process(torch.device("cpu")), *arguments)


def folder_of(config: PretrainConfig) -> RunFolder:
    return RunFolder(Path(config.output_dir))


def records(config: PretrainConfig) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return read_lines(folder_of(config).metrics)


def losses(config: PretrainConfig) -> list[float]:
    return [record["loss"] for record in records(config)]


def outcome(config: PretrainConfig) -> dict[str, Any]:
    """What rank 0 left for the driver."""
    return json.loads(newest(folder_of(config).epochs).outcome.read_text())


def score(config: PretrainConfig) -> float:
    """Held-out bits per byte after the last step."""
    return outcome(config)["held_out_bits_per_byte"]


def first_gradients(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """The gradient of each weight in a run's only step, from Adam's first moment after it."""
    found = find(folder_of(config).checkpoints)
    return {f"{name}:exp_avg": value / (1 - BETAS[0]) for name, value in saved_moments(found, "exp_avg").items()}


def saved_weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint."""
    return find(folder_of(config).checkpoints).state_dict()


def saved_moments(found: Checkpoint, key: str) -> dict[str, torch.Tensor]:
    """One kind of them, by the weight, in its shape."""
    tensors, shapes = found.tensors(), {name: torch.Size(each) for name, each in found.manifest.shapes.items()}
    return {
        name: tensors.range(name, key, 0, shape.numel()).view(shape)
        for name, shape in shapes.items()
        if tensors.has(name, key)
    }


def as_it_was_at(config: PretrainConfig, step: int, name: str, **sections: Any) -> PretrainConfig:
    """A copy of a finished run without the checkpoints after `step`: as if it had been killed after its last step."""
    copy = change(config, name, **sections)
    shutil.copytree(config.output_dir, copy.output_dir)
    for folder in folder_of(copy).checkpoints.iterdir():
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    return copy


def grid(data: int, sequence: int, stage: int) -> dict[str, int]:
    return {"data": data, "sequence": sequence, "zero_stage": stage}


def assert_same_step(config: PretrainConfig, expected: PretrainConfig, tolerance: float = 1e-5) -> None:
    came, gradients = first_gradients(config), first_gradients(expected)
    assert came.keys() == gradients.keys()
    assert len(gradients) > 20
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # A gradient that is zero but for rounding is held to the size of the others.
        assert (came[name] - gradient).norm() < tolerance * max(gradient.norm(), 1e-2 * largest), (config, name)
    # Each weight counts once in the norm, and each token once, though every rank has a copy or a piece of them.
    [record], [truth] = records(config), records(expected)
    for field in ("loss", "grad_norm", "tokens", "total_tokens"):
        assert record[field] == pytest.approx(truth[field], rel=tolerance), (config.parallel, field)
    assert score(config) == pytest.approx(score(expected), rel=tolerance), config.parallel


def in_tiers(some, others):
    """Parameters: `some` for the tier `all`, and `others` for `full`."""
    return [pytest.param(some, marks=pytest.mark.all), pytest.param(others, marks=pytest.mark.full)]
