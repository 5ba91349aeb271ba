"""Small configs, and processes that act as ranks, for the tests of the runtime."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# Imported before ranks are forked, so that each doesn't import it anew.
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch._inductor.compile_fx
from safetensors.torch import load_file

from seqtrain.data import DataConfig, prepare
from seqtrain.mixers import MIXERS
from seqtrain.models import ModelConfig
from seqtrain.parallel.testing import RankError, rank_outcomes
from seqtrain.runtime.checkpoint import find
from seqtrain.runtime.metrics import read_lines
from seqtrain.runtime.ranks import Ranks, this_process
from seqtrain.runtime.run_folder import RunFolder, claim
from seqtrain.runtime.settings import (
    CheckpointConfig,
    EvaluationConfig,
    KernelsConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RuntimeConfig,
    SampleConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from seqtrain.runtime.worker import Session, train

WORDS = ["state", "scan", "delta", "gate", "key", "value", "query", "chunk", "decay", "head", "token", "loss", "rank"]
# Seconds after which ranks that still run are taken for hung.
RANKS_SECONDS = 90
BETAS = (0.9, 0.95)


def write_text(folder: Path) -> Path:
    """A folder with a few files of random words, the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(chance.choices(WORDS, k=400)))
    return folder


def small_config(root: Path, **sections: Any) -> PretrainConfig:
    """A run of a few seconds below `root`; `sections` are keyword changes by section, as dicts."""
    layers = ("linear_attention",)
    config = PretrainConfig(
        model=ModelConfig(layers=layers, depth=2, width=16, heads=2),
        mixer={name: MIXERS.get(name).Config() for name in layers},
        data=DataConfig(
            source="text", path=str(write_text(root / "text")), cache_dir=str(root / "cache"), held_out=0.2
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_fraction=0.1),
        train=TrainConfig(steps=6, sequence_length=32, batch_size=8, micro_batch_size=2),
        evaluation=EvaluationConfig(),
        parallel=ParallelConfig(),
        runtime=RuntimeConfig(name="inline", cpus_per_worker=1),
        checkpoint=CheckpointConfig(every=3),
        tracking=TrackingConfig(mode="disabled"),
        sample=SampleConfig(prompt="state", tokens=8),
        kernels=KernelsConfig(),
        seed=1,
        output_dir=str(root / "out"),
    )
    return change(config, **sections)


def change(config: PretrainConfig, **sections: Any) -> PretrainConfig:
    """`config` with other values: `change(c, train={"steps": 3}, seed=2)`."""
    new = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) and name != "mixer" else value
        for name, value in sections.items()
    }
    return replace(config, **new)


def session_for(config: PretrainConfig) -> Session:
    """Prepares data and folder as the driver does."""
    corpus = prepare(config.data, progress=False)
    session = Session(config, corpus.folder.resolve(), name="test", tracking_id="")
    claim(session.folder, config)
    return session


def train_alone(config: PretrainConfig, *, after_step: Callable[[], None] = lambda: None) -> None:
    """Trains `config` on one rank, in a process of its own: a group formed here would be in the way of later forks."""
    session = session_for(config)
    on_ranks(1, lambda ranks: train(session, ranks, after_step=after_step))


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


def short_documents(folder: Path) -> str:
    """Texts of 1 to 60 letters: some shorter than a convolution, some longer than a rank's share of a row."""
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(
            "state scan delta gate "[number % 7 :] * 3 if number % 3 else "abc"[: 1 + number % 2]
        )
    return str(folder)


def folder_of(config: PretrainConfig) -> RunFolder:
    return RunFolder(Path(config.output_dir))


def records(config: PretrainConfig) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return read_lines(folder_of(config).metrics)


def losses(config: PretrainConfig) -> list[float]:
    return [record["loss"] for record in records(config)]


def outcome(config: PretrainConfig) -> dict[str, Any]:
    """What rank 0 left for the driver."""
    return json.loads(folder_of(config).outcome.read_text())


def first_gradients(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """The gradient of each weight in a run's only step, from Adam's first moment after it; its betas are `BETAS`."""
    folder = find(folder_of(config).checkpoints).folder
    moments = {key: value for file in folder.glob("optimizer-*") for key, value in load_file(file).items()}
    return {key: value / (1 - BETAS[0]) for key, value in moments.items() if key.endswith(":exp_avg")}


def as_it_was_at(config: PretrainConfig, step: int, name: str, **sections: Any) -> PretrainConfig:
    """A copy of a finished run without the checkpoints after `step`: as if it had been killed after its last step."""
    copy = change(config, output_dir=str(Path(config.output_dir).with_name(name)), **sections)
    shutil.copytree(config.output_dir, copy.output_dir)
    for folder in folder_of(copy).checkpoints.iterdir():
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    return copy


def train_each(ranks: Ranks, sessions: list[Session]) -> None:
    """Trains several sessions one after the other on the same ranks."""
    for session in sessions:
        train(session, ranks)
