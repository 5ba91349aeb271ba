"""Measures what predictions stand on, on this machine: rates, each mixer's efficiency, memory's holes, links."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seqtrain.benchmarks.ranks import on_ranks
from seqtrain.benchmarks.scan_methods import CPU, group_costs
from seqtrain.kernels import linear_attention
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.mesh import form_mesh
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sharded import ShardedSequence
from seqtrain.planning.counts import ModelCounts, count_model
from seqtrain.planning.layout import Holes, Machine, compute_seconds, memory_bytes
from seqtrain.planning.layout_runs import measure_layout
from seqtrain.planning.run_config import count_run, last_of_each, layout_of, read_run
from seqtrain.report import machine as describe_machine

BYTES_VOCAB = 257
TOKENS, WIDTH, HEADS = 2048, 192, 4
# Tokens per rank of a sharded sequence: in the processor's cache the work of finding its map would look like none.
SHARD_TOKENS = 8192
REPEATS = 5
# With activations kept and recomputed it tells the allocator's holes of both kinds.
SMALL_LAYOUT = (
    "model=hybrid_tiny", "model.depth=4", "model.width=192", "data=stdlib", "train.sequence_length=12288",
    "train.batch_size=1", "train.micro_batch_size=1", "parallel.data=1",
)  # fmt: skip
# As many tokens per rank, of the mixer whose layers on a sharded sequence are measured.
SHARDED = ("parallel.sequence=2", "train.sequence_length=24576")
SHARDED_MIXER = "gla"
AGAIN = "model.activation_checkpointing"
PLAIN = "parallel.zero_stage=0"


def calibrate(mixers: Sequence[str], *, tell: Callable[[str], None]) -> tuple[Machine, dict[str, float]]:
    """This machine, and the costs of its links. `mixers`: whose efficiency is measured; `tell` hears of progress."""
    tell("links")
    costs = on_ranks(2, lambda group: asdict(group_costs(group)))
    tell("products, memory, attention, recurrences, optimizer")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    found = Machine(
        name=f"measured: {describe_machine()}", memory=0.9 * total, shared=True, processors=cores, **_rates()
    )
    found = _with_memory(found, mixers, tell)
    efficiency: dict[str, float] = {}
    for name in mixers:
        tell(f"layer {name}")
        efficiency |= _efficiency(name, found)
    tell("layers on a sequence sharded over two ranks")
    cut = on_ranks(2, _sharded, tuple(mixers))
    tell("two ranks side by side")
    beside = on_ranks(2, _crowded) if cores > 1 else 1.0
    return replace(found, efficiency=efficiency, cut=cut, beside=beside), costs


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
    q = torch.randn(1, HEADS, 1024, 64)
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
        "attention": pairs / median_seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
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
    counts = count_model(model.config, mixers, BYTES_VOCAB, tokens=TOKENS)
    block: Any = model.blocks[0]
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    def whole() -> None:
        model(tokens, tokens).backward()

    def alone() -> None:
        (x + block.mixer(block.mixer_norm(x))[0]).sum().backward()

    measured, own = median_seconds(whole, 3), median_seconds(alone, 3)
    mixing, others = (
        sum(compute_seconds(replace(counts, parts=parts), found, checkpointing=False).values())
        for parts in (counts.parts[1:2], tuple(part for part in counts.parts if part.part != "mixer"))
    )
    rest = max(measured - model.config.depth * own, 0.1 * measured) / others
    return {name: own / mixing, "mlp": rest, "loss": rest}


def _with_memory(found: Machine, mixers: Sequence[str], tell: Callable[[str], None]) -> Machine:
    """`found` with the base and, from small layouts, the allocator's holes and what a sharded sequence keeps."""
    tell("memory of a program")
    sharded_mixer = f"model.layers=[{SHARDED_MIXER}]"
    tiny = (sharded_mixer, "model.depth=1", "model.width=32", "train.sequence_length=64", PLAIN)
    found = replace(found, base=measure_layout(last_of_each(*SMALL_LAYOUT, *tiny), steps=2).peak_bytes)
    all_holes = {}
    for name in dict.fromkeys((SHARDED_MIXER, *mixers)):
        tell(f"memory of {name}")
        # Of small layouts of this mixer alone.
        layers = f"model.layers=[{name}]"
        holes = Holes(*_shares(found, layers))
        own = replace(found, holes={name: holes})
        _, passing, more = _beyond(own, (layers,), "parallel.zero_stage=3", f"{AGAIN}=true")
        all_holes[name] = replace(holes, sharded=max(0.0, more / passing))
    found = replace(found, holes=all_holes)
    tell("memory of a sharded sequence")
    kept, passing = _shares(found, sharded_mixer, *SHARDED)
    return replace(found, cut_kept=kept, cut_passing=passing)


def _shares(found: Machine, *words: str) -> tuple[float, float]:
    """What small layouts take beyond what is expected, for each byte kept and for each passing one of small blocks."""
    (a, b, x), (c, d, y) = (_beyond(found, words, PLAIN, f"{AGAIN}={again}") for again in ("false", "true"))
    determinant = a * d - b * c
    return max(0.0, (x * d - b * y) / determinant), max(0.0, (a * y - x * c) / determinant)


def _beyond(found: Machine, words: tuple[str, ...], *how: str) -> tuple[float, float, float]:
    """Of the small layout with these words, run so: bytes kept, passing, in small blocks; measured beyond expected."""
    chosen = last_of_each(*SMALL_LAYOUT, *words, *how)
    config = read_run(["experiment=quickstart", *chosen])
    counts, measured = _counts(*words), measure_layout(chosen, steps=3)
    kept, passing = counts.small_bytes(checkpointing=config.model.activation_checkpointing)
    return kept, passing, measured.peak_bytes - sum(memory_bytes(counts, layout_of(config), found).values())


@cache
def _counts(*words: str) -> ModelCounts:
    """Of the small layout with these words; ZeRO and recomputation change nothing in it."""
    return count_run(read_run(["experiment=quickstart", *last_of_each(*SMALL_LAYOUT, *words)]))
