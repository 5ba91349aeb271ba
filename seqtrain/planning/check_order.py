"""Shows that the communication of a run's step can't deadlock on GPUs, or who would wait for whom.

    python tools/check_order.py parallel.data=2 parallel.sequence=4 parallel.zero_stage=3
    python tools/check_order.py model=hybrid_125m parallel.sequence=8 parallel.data=1 model.width=64 model.heads=8
    python tools/check_order.py parallel.data=8 parallel.zero_stage=3 parallel.shard=4 check.tokens=64

The keys are those of launch/pretrain.py. A process for each rank runs the start and the first step of the model, cut to
one period of its layers, on short sequences of made-up documents, and notes what it asks of which communicator, as on
GPUs: gloo stands for NCCL. What all have noted is then looked at as a graph, once as if a GPU ran one operation of each
communicator at a time, once as if it ran one in all. Exit status 1 where it isn't free of deadlock.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from seqtrain.config import split_settings
from seqtrain.data import DataConfig, prepare
from seqtrain.parallel.order import QUEUES, Operation, crossing, deadlocks, recorded
from seqtrain.parallel.testing import run_ranks
from seqtrain.planning.layout_runs import QUIET, Done
from seqtrain.planning.run_config import last_of_each, read_run
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.checks import check
from seqtrain.runtime.lease import take
from seqtrain.runtime.ranks import Ranks, is_lost_peer, this_process
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.task import Callback, Phase
from seqtrain.runtime.worker import Session, train

# Rows of a group of ranks in a step: two micro-batches.
ROWS = 2
Orders = list[list[Operation]]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Settings:
    # Tokens of a sequence that a rank has.
    tokens: Positive = 24
    # Seconds a rank waits for another: what deadlocks ends then, and is shown.
    patience: Positive = 20


def reduced(config: PretrainConfig, folder: Path, tokens: int) -> PretrainConfig:
    """A run that asks for what `config` asks for: one period of layers, `tokens` a rank, a text in `folder`."""
    chance, text = random.Random(0), folder / "text"
    text.mkdir(parents=True)
    for number in range(80):
        # Some documents are shorter than a rank's part, some reach over several.
        (text / f"{number:02d}.txt").write_text("abcdefgh"[number % 8] * chance.choice((1, 3, 20, 90)))
    parallel, train = config.parallel, config.train
    segments = 0 if not train.segment_tokens else tokens * parallel.sequence // 2
    return replace(
        config,
        model=replace(config.model, depth=min(config.model.depth, config.model.period)),
        data=DataConfig(source="text", path=str(text), cache_dir=str(folder / "cache"), held_out=0.2),
        train=replace(
            train,
            steps=2,
            sequence_length=tokens * parallel.sequence,
            batch_size=ROWS * parallel.data,
            batch_warmup=(),
            batch_warmup_steps=0,
            micro_batch_size=1,
            segment_tokens=segments,
        ),
        output_dir=str(folder / "run"),
    )


class FirstStep(Callback):
    """Ends a run before its second step."""

    steps = 0

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        self.steps += name == "step"
        if self.steps > 1:
            raise Done
        return nullcontext()


def first_step(session: Session, ranks: Ranks) -> list[Operation]:
    """What this rank asks for up to the end of its first step, or to where the others no longer answer."""
    with recorded() as noted:
        try:
            train(replace(session, callback=FirstStep()), ranks)
        except Done:
            pass
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
    return noted


def orders_of(*configs: PretrainConfig, settings: Settings = Settings()) -> list[Orders]:
    """Of each run, all of equally many ranks, what each rank asks for, in order, up to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for number, config in enumerate(configs):
            small = reduced(config, Path(folder) / f"{number}", settings.tokens)
            check(replace(small, runtime=replace(small.runtime, name="ray")))
            corpus = prepare(small.data, progress=False)
            lease = take(RunFolder(Path(small.output_dir)).epochs, "order", seconds=small.runtime.lease_seconds)
            sessions.append(Session(small, corpus.folder.resolve(), "order", lease.epoch))

        def rank(_: int) -> Orders:
            torch.set_num_threads(1)
            return [first_step(session, this_process(torch.device("cpu"))) for session in sessions]

        by_rank = run_ranks(configs[0].parallel.ranks, rank, limit=600.0, group_timeout=settings.patience)
        return [list(orders) for orders in zip(*by_rank, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """What was found: by how much runs at once on a GPU, in words, what keeps ranks from coming to an end."""

    orders: Orders
    found: dict[str, list[str]]

    @classmethod
    def of(cls, orders: Orders) -> "Verdict":
        return cls(orders, {queues: deadlocks(orders, queues) for queues in QUEUES})

    @property
    def free(self) -> bool:
        return not any(self.found.values())

    def __str__(self) -> str:
        lines = []
        kinds = Counter(each.kind for each in self.orders[0])
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        communicators = {each.communicator for order in self.orders for each in order}
        lines.append(f"{len(self.orders)} ranks, {len(communicators)} communicators; of rank 0: {counted}")
        for queues, found in self.found.items():
            once = "one operation of each communicator" if queues == "communicator" else "one operation in all"
            lines.append(f"{once} at a time: {'can deadlock' if found else 'free of deadlock'}")
            lines += [f"  {line}" for line in found[:4]]
        if crossing(self.orders):
            lines.append(
                "communicators share ranks: the second holds where GPUs keep the order of their hosts, which runs ask "
                "NCCL for (see parallel.overlap)"
            )
        return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    settings, overrides = split_settings(Settings, "check", arguments)
    config = read_run(last_of_each(*QUIET, *overrides, "output_dir=order"))
    [orders] = orders_of(config, settings=settings)
    verdict = Verdict.of(orders)
    print(verdict)
    return 0 if verdict.free else 1
