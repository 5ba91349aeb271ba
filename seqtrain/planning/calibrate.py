"""Measures what predictions stand on, here: rates, each mixer's efficiency, memory, links; and how far they are off."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.benchmarks.ranks import on_ranks
from seqtrain.benchmarks.scan_methods import CPU, group_costs
from seqtrain.kernels import linear_attention, softmax_attention
from seqtrain.memory import MAPPED_ABOVE
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.mesh import form_mesh
from seqtrain.parallel.schedules.links import Cluster
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sharded import ShardedSequence
from seqtrain.planning.counts import ModelCounter
from seqtrain.planning.layout import ClusterFile, Machine, Prediction, compute_seconds, predict
from seqtrain.planning.layout_runs import Measured, measure_layout
from seqtrain.planning.run_config import count_run, last_of_each, layout_of, read_run
from seqtrain.report import announced
from seqtrain.report import machine as describe_machine

BYTES_VOCAB = 257
TOKENS, WIDTH, HEADS = 2048, 192, 4
# Tokens per rank of a sharded sequence: in the processor's cache the work of finding its map would look like none.
SHARD_TOKENS = 8192
REPEATS = 5
# Small layouts whose steps say how much memory lies unused, and how far predictions are from what is measured.
SMALL_LAYOUT = (
    "model=hybrid_tiny", "model.depth=4", "model.width=192", "data=stdlib", "train.sequence_length=12288",
    "train.batch_size=1", "train.micro_batch_size=1", "parallel.data=1", "parallel.zero_stage=0",
)  # fmt: skip
TINY = ("model.layers=[gla]", "model.depth=1", "model.width=32", "train.sequence_length=64")
WAYS = (
    ("model.activation_checkpointing=false",),
    ("model.activation_checkpointing=true", "parallel.zero_stage=1"),
)
SHARDED = ("model.layers=[gla]", "parallel.sequence=2", "train.sequence_length=24576")


def calibrate(mixers: Sequence[str]) -> tuple[Machine, dict[str, float]]:
    """This machine, and the costs of its links. `mixers`: whose efficiency is measured."""
    with announced("measuring links"):
        costs = on_ranks(2, lambda group: asdict(group_costs(group)))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    with announced("measuring products, memory, attention, recurrences, optimizer"):
        rates = _rates()
    found = Machine(
        name=f"measured: {describe_machine()}",
        memory=0.9 * total,
        shared=True,
        processors=cores,
        mapped_above=MAPPED_ABOVE,
        **rates,
    )
    efficiency: dict[str, float] = {}
    for name in mixers:
        with announced(f"measuring a layer of {name}"):
            efficiency |= _efficiency(name, found)
    with announced("measuring layers on a sequence sharded over two ranks"):
        cut = on_ranks(2, _sharded, tuple(mixers))
    with announced("measuring two ranks side by side"):
        beside = on_ranks(2, _crowded) if cores > 1 else 1.0
    found = replace(found, efficiency=efficiency, cut=cut, beside=beside)
    return _with_layouts(found, ClusterFile(**costs, source="here").links(), mixers), costs


def median_seconds(
    run: Callable[[], Any], repeats: int = REPEATS, *, clock: Callable[[], float] = time.thread_time
) -> float:
    """Of `run` after a first call; by default seconds of this thread, in which other programs do not count."""
    times = []
    for _ in range(repeats + 1):
        begin = clock()
        run()
        times.append(clock() - begin)
    return statistics.median(times[1:])


def _rates() -> dict[str, Any]:
    torch.set_num_threads(1)
    rows, matrix = torch.randn(4096, WIDTH), torch.randn(WIDTH, 2 * WIDTH)
    flops = 2 * rows.numel() * matrix.shape[1]
    narrow = rows.bfloat16(), matrix.bfloat16()
    a, b, tiny = torch.randn(2**21), torch.randn(2**21), torch.randn(16)
    q = torch.randn(1, 1024, HEADS, 64)
    pairs = 2 * HEADS * 1024 * 1024 * 128 // 2
    heads = torch.randn(1, 4096, HEADS, 48)
    weight = torch.nn.Parameter(torch.randn(2**20))
    weight.grad = torch.randn(2**20)
    optimizer = torch.optim.AdamW([weight])
    old = torch.zeros(2**24)
    fresh = median_seconds(lambda: torch.empty(2**24).zero_()) - median_seconds(old.zero_)
    chunk = 4 * 4096 * HEADS * 48 * (48 + 64)  # of the chunk form: state and, within chunks of 64, pairs
    decay = -torch.rand(1, 4096, HEADS)
    return {
        "products": {
            "float32": flops / median_seconds(lambda: rows @ matrix),
            "bfloat16": flops / median_seconds(lambda: narrow[0] @ narrow[1]),
        },
        "attention": pairs / median_seconds(lambda: softmax_attention(q, q, q)),
        "kernels": chunk / median_seconds(lambda: linear_attention(heads, heads, heads, decay)),
        "stream": 12 * 2**21 / median_seconds(lambda: a + b),
        "fresh": max(0.0, fresh) / old.nbytes,
        "call": median_seconds(lambda: [tiny + tiny for _ in range(1000)]) / 1000,
        "optimizer": median_seconds(optimizer.step) / 2**20,
    }


def _sharded(group: dist.ProcessGroup, mixers: Sequence[str]) -> dict[str, float]:
    """By mixer, a layer's seconds on its shard of a sequence on two ranks, over those on as many tokens of its own."""
    found = {}
    with form_mesh(group, sequence=2, algorithm="auto", device=CPU, timeout_seconds=600) as mesh:
        assert mesh.group is not None
        ends = torch.tensor([0, 2 * SHARD_TOKENS])
        sharded = ShardedSequence(group=mesh.group, offsets=(0, SHARD_TOKENS, 2 * SHARD_TOKENS), cu_seqlens=ends)
        for name in mixers:
            mixer = _small_model(name).blocks[0].mixer
            x = torch.randn(1, SHARD_TOKENS, WIDTH, requires_grad=True)

            def run(sequence: SequenceContext, mixer: Any = mixer, x: Tensor = x) -> None:
                mixer(x, sequence=sequence)[0].sum().backward()

            # Of all threads: messages have their own. The rank that works most is the one all wait for.
            alone, together = (
                median_seconds(partial(run, tokens), 3, clock=time.process_time)
                for tokens in (SequenceContext(), sharded)
            )
            found[name] = _largest(torch.tensor(together / alone), group)
    return found


def _crowded(group: dist.ProcessGroup) -> float:
    """Seconds of a model's pass while the other rank makes one as well, over those while it waits."""
    model = _small_model("gated_delta_net")
    tokens = torch.randint(BYTES_VOCAB, (1, SHARD_TOKENS))

    def run() -> None:
        model(tokens, tokens).backward()

    alone = torch.zeros(1)
    for turn in range(2):
        if group.rank() == turn:
            alone += median_seconds(run)
        dist.barrier(group=group)
    return _largest(median_seconds(run) / alone, group)


def _largest(ratio: Tensor, group: dist.ProcessGroup) -> float:
    """Of all ranks; at least 1."""
    dist.all_reduce(ratio, op=dist.ReduceOp.MAX, group=group)
    return max(1.0, ratio.item())


def _small_model(name: str) -> LanguageModel:
    """Two layers of this mixer."""
    config = ModelConfig(layers=(name,), depth=2, width=WIDTH, heads=HEADS, mlp_ratio=2.0)
    return LanguageModel(config, {name: MIXERS.get(name).Config()}, BYTES_VOCAB)


def _efficiency(name: str, found: Machine) -> dict[str, float]:
    """Measured over computed seconds of one layer of this mixer, its MLP and the loss taken alike."""
    model, mixers = _small_model(name), {name: MIXERS.get(name).Config()}
    tokens = torch.randint(BYTES_VOCAB, (1, TOKENS))
    counts = ModelCounter(model.config, mixers, BYTES_VOCAB).count(TOKENS)
    block: Any = model.blocks[0]
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    def whole() -> None:
        model(tokens, tokens).backward()

    def alone() -> None:
        (x + block.mixer(block.mixer_norm(x))[0]).sum().backward()

    measured, own = median_seconds(whole, 3), median_seconds(alone, 3)
    mixing, others = (
        sum(compute_seconds(replace(counts, parts=parts), found, again=0).values())
        for parts in (counts.parts[1:2], tuple(part for part in counts.parts if part.part != "mixer"))
    )
    rest = max(measured - model.config.depth * own, 0.1 * measured) / others
    return {name: own / mixing, "mlp": rest, "loss": rest}


def _with_layouts(found: Machine, cluster: Cluster, mixers: Sequence[str]) -> Machine:
    """`found` with a program's memory and, from small layouts, what lies unused beside activations, and the errors."""
    with announced("measuring the memory of a program"):
        base = measure_layout(last_of_each(*SMALL_LAYOUT, *TINY), steps=2).peak_bytes
    found, pairs = replace(found, base=base), []
    for words in (*((f"model.layers=[{name}]", *way) for name in mixers for way in WAYS), SHARDED):
        chosen = last_of_each(*SMALL_LAYOUT, *words)
        config = read_run(["experiment=quickstart", *chosen])
        with announced(f"measuring steps of {' '.join(words)}"):
            expected = predict(count_run(config), layout_of(config), found, cluster)
            pairs.append((expected, measure_layout(chosen, steps=3)))
    return with_errors(found, pairs)


def with_errors(found: Machine, pairs: Sequence[tuple[Prediction, Measured]]) -> Machine:
    """`found`, whose predictions these are, with what lies unused, by least squares, and with the largest errors."""
    sizes = np.array([(e.bytes["activations kept"], e.bytes["temporaries and gradients"]) for e, _ in pairs])
    expected, peaks = (
        np.array(column) for column in zip(*((e.peak_bytes, m.peak_bytes) for e, m in pairs), strict=True)
    )
    factors = np.linalg.lstsq(sizes / peaks[:, None], 1 - expected / peaks)[0].clip(0.0)
    memory = peaks / (expected + sizes @ factors)
    time = np.array([m.seconds / e.step_seconds for e, m in pairs])
    memory_error, time_error = (float(np.maximum(ratios, 1 / ratios).max()) - 1 for ratios in (memory, time))
    kept, passing = factors.tolist()
    return replace(found, unused_kept=kept, unused_passing=passing, memory_error=memory_error, time_error=time_error)
