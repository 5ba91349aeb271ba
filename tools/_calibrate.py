"""Measures what predictions stand on, on this machine: rates, each mixer's efficiency, memory's holes, links."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from _layout_runs import measure_layout
from _overrides import count_run, read_run
from _ranks import on_ranks
from _scan_methods import CPU
from _settings import machine as describe_machine

from seqtrain.analysis.counts import count_model
from seqtrain.analysis.layout import Layout, Machine, compute_seconds, memory_bytes
from seqtrain.kernels import linear_attention
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.cost import costs_of
from seqtrain.parallel.engine import engine_of
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.settings import micro_batch

BYTES_VOCAB = 257
TOKENS, WIDTH, HEADS = 2048, 192, 4
REPEATS = 5
# Two small layouts, with layers kept and computed again, tell the allocator's holes of both kinds.
SMALL_LAYOUT = (
    "model=hybrid_tiny", "model.layers=[gla,gated_delta_net]", "model.depth=4", "model.width=192", "data=stdlib",
    "train.sequence_length=4096", "train.batch_size=1", "train.micro_batch_size=1", "parallel.data=1",
)  # fmt: skip


def calibrate(mixers: Sequence[str], *, tell: Callable[[str], None]) -> tuple[Machine, dict[str, float]]:
    """This machine, and the costs of its links. `mixers`: whose efficiency is measured; `tell` hears of progress."""
    tell("links")
    costs = on_ranks(2, lambda group: asdict(costs_of(engine_of(group.group_name), CPU)))
    tell("products, memory, attention, recurrences, optimizer")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    found = Machine(
        name=f"measured: {describe_machine()}", memory=0.9 * total, shared=True, processors=cores, **_rates()
    )
    efficiency = {}
    for name in mixers:
        tell(f"layer {name}")
        efficiency |= _efficiency(name, found)
    found = replace(found, efficiency=efficiency)
    tell("memory of two small layouts")
    return _with_memory(found), costs


def layout_of(config: PretrainConfig) -> Layout:
    """How a run is divided."""
    parallel = config.parallel
    return Layout(
        parallel.data,
        parallel.sequence,
        parallel.zero_stage,
        config.model.activation_checkpointing,
        micro_batch(config),
        config.train.batch_size,
    )


def _seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median processor seconds of this thread: other programs' share of the machine does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.thread_time()
        run()
        times.append(time.thread_time() - begin)
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
    fresh = _seconds(lambda: torch.empty(2**24).zero_()) - _seconds(old.zero_)
    chunk = 4 * 4096 * HEADS * 48 * (48 + 64)  # of the chunk form: state and, within chunks of 64, pairs
    decay = -torch.rand(1, 4096, HEADS)
    return {
        "products": {
            "float32": flops / _seconds(lambda: rows @ matrix),
            "bfloat16": flops / _seconds(lambda: narrow[0] @ narrow[1]),
        },
        "attention": pairs / _seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        "kernels": chunk / _seconds(lambda: linear_attention(heads, heads, heads, decay)),
        "stream": 12 * 2**21 / _seconds(lambda: a + b),
        "fresh": max(0.0, fresh) / old.nbytes,
        "call": _seconds(lambda: [tiny + tiny for _ in range(1000)]) / 1000,
        "optimizer": _seconds(optimizer.step) / 2**20,
    }


def _efficiency(name: str, found: Machine) -> dict[str, float]:
    """Measured over computed seconds of one layer of this mixer, its MLP and the loss taken alike."""
    config = ModelConfig(layers=(name,), depth=2, width=WIDTH, heads=HEADS, mlp_ratio=2.0)
    mixers = {name: MIXERS.get(name).Config()}
    model = LanguageModel(config, mixers, BYTES_VOCAB)
    tokens = torch.randint(BYTES_VOCAB, (1, TOKENS))
    counts = count_model(config, mixers, BYTES_VOCAB, tokens=TOKENS)
    mixer = model.blocks[0]
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    def whole() -> None:
        model(tokens, tokens).backward()

    def alone() -> None:
        (x + mixer.mixer(mixer.mixer_norm(x))[0]).sum().backward()

    measured, own = _seconds(whole, 3), _seconds(alone, 3)
    one = replace(counts, parts=(counts.parts[1],))
    rest = replace(counts, parts=tuple(part for part in counts.parts if part.part != "mixer"))
    others = max(measured - config.depth * own, 0.1 * measured) / sum(
        compute_seconds(rest, found, again=False).values()
    )
    mixing = own / sum(compute_seconds(one, found, again=False).values())
    return {name: mixing, "mlp": others, "loss": others}


def _with_memory(found: Machine) -> Machine:
    """`found` with the base and the holes that two small layouts and a tiny one show."""
    tiny = ("model.depth=1", "model.width=32", "train.sequence_length=64", "parallel.zero_stage=0")
    base = measure_layout([*SMALL_LAYOUT, *tiny], steps=2).peak_bytes
    found = replace(found, base=base)
    rows = []
    for again in ("false", "true"):
        words = [*SMALL_LAYOUT, "parallel.zero_stage=0", f"model.activation_checkpointing={again}"]
        config = read_run(["experiment=quickstart", *words])
        counts, measured = count_run(config), measure_layout(words, steps=3)
        expected = sum(memory_bytes(counts, layout_of(config), found).values())
        kept = counts.saved_bytes(checkpointing=again == "true", small=True)
        passing = counts.peak_bytes(checkpointing=again == "true", small=True) - kept
        rows.append((kept, passing, measured.peak_bytes - expected))
    (a, b, x), (c, d, y) = rows
    determinant = a * d - b * c
    factors = ((x * d - b * y) / determinant, (a * y - x * c) / determinant)
    return replace(found, kept_factor=1 + max(0.0, factors[0]), passing_factor=1 + max(0.0, factors[1]))
