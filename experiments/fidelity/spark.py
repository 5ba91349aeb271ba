"""Spark's MLP (arXiv 2506.06644): the share of channels that it keeps, and what decoding gains by skipping others."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.fidelity.optimizers import LENGTH, STEPS, help_pages, trained
from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row
from experiments.fidelity.timing import fastest
from seqtrain.kernels.softmax_attention.largest import attend
from seqtrain.models import LanguageModel
from seqtrain.models.feed_forward import MLP
from seqtrain.models.spark import SparkConfig, SparkMLP

# Of Gemma-2 2B, as in the paper: channels, hidden channels of its MLP, and of Spark's with as many weights.
WIDTH, HIDDEN, SPARK, PREDICT = 2304, 9216, 13824, 1024
SHARES = (0.02, 0.08, 0.32)
# Keys held, those that are read (the paper's), query heads, key heads, channels.
KEYS, KEPT, HEADS, GROUPS, KEY = 65536, 256, 8, 2, 128
REPEATS = 20


def measure(effort: Effort) -> Iterator[Figure]:
    """Seconds of a dense MLP over Spark's, one token; accuracy and the share kept after training."""
    small = effort.scale < 0.1
    gains = [[gain(share, seed, small=small) for share in SHARES] for seed in effort.seeds]
    curve = Curve(f"one token, seed {effort.seeds[0]}", SHARES, tuple(gains[0]))
    yield Figure(
        "dense MLP's seconds over Spark's, 8% kept, one token",
        tuple(row[SHARES.index(0.08)] for row in gains),
        Bounds(at_least=1.5),
        curves=(curve,),
    )
    few = tuple(gain_of_keys(seed, small=small) for seed in effort.seeds)
    yield Figure(
        f"softmax over all of {KEYS} keys over that of {KEPT}, one token", few, Bounds(at_least=1.5), length=KEYS
    )
    text = help_pages()
    ways = ("mlp", "spark")
    runs = {
        kind: [trained("adamw", text, seed, effort.of(STEPS), mlps=(kind,)) for seed in effort.seeds] for kind in ways
    }
    more = tuple(sparse[0] - dense[0] for sparse, dense in zip(runs["spark"], runs["mlp"], strict=True))
    bounds = Bounds(at_most=0.1) if effort.scale >= 0.5 else Bounds(at_most=10)
    yield Figure(f"bits a byte more than a dense MLP's after {STEPS} steps", more, bounds, length=LENGTH)
    kept = tuple(share_kept(run[2], seed) for run, seed in zip(runs["spark"], effort.seeds, strict=True))
    yield Figure("share of channels kept after training, asked 0.08", kept, Bounds(0.06, 0.10))


@torch.no_grad()
def gain(share: float, seed: int, *, small: bool = False) -> float:
    """Of keeping so many hidden channels."""
    torch.manual_seed(seed)
    factor = 16 if small else 1
    width, sizes = WIDTH // factor, (HIDDEN // factor, SPARK // factor)
    x = torch.randn(1, width)
    dense = MLP(width, sizes[0], activation="gelu_tanh")
    spark = SparkMLP(width, sizes[1], SparkConfig(share, PREDICT // factor), activation="gelu_tanh")
    for parameter in spark.parameters():
        parameter.normal_(std=width**-0.5)
    return fastest(lambda: dense(x), REPEATS) / fastest(lambda: spark(x), REPEATS)


@torch.no_grad()
def gain_of_keys(seed: int, *, small: bool = False) -> float:
    """Of reading `KEPT` keys, which half of the channels choose."""
    generator, keys = torch.Generator().manual_seed(seed), KEYS // 64 if small else KEYS
    q, k, v = (
        torch.randn(1, tokens, heads, KEY, generator=generator)
        for tokens, heads in ((1, HEADS), (keys, GROUPS), (keys, GROUPS))
    )
    asked, held, read, seen = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), torch.tensor([keys])
    dense = fastest(lambda: F.scaled_dot_product_attention(asked, held, read, enable_gqa=True), REPEATS)
    options = {"scale": KEY**-0.5, "cap": 0.0, "kept": KEPT, "width": KEY // 2}
    return dense / fastest(lambda: attend(q, k, v, seen, **options), REPEATS)


@torch.no_grad()
def share_kept(model: LanguageModel, seed: int) -> float:
    """Of all hidden channels of all layers, on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (8, LENGTH), generator=generator)
    found: list[Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda mlp, given: found.append((mlp.gate(given[0]) > 0).double().mean()))
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean().item()


ROW = Row(
    name="spark",
    claim="an MLP that keeps 8% of its channels is as good at equal weights, and decodes faster: up to 1.79 times for "
    "a whole Gemma-2 2B on a CPU (You et al. 2025, arXiv 2506.06644)",
    method=f"one token through an MLP of Gemma-2 2B's sizes, float32, one thread, the fastest of {REPEATS}: {WIDTH} "
    f"channels, {HIDDEN} hidden ones, against {SPARK}, of which the first {PREDICT} channels predict those kept. "
    f"Attention of {HEADS} heads on {GROUPS} key heads of {KEY} channels, keys and values at hand. Then bytes of "
    f"Python's help pages, {STEPS} steps of AdamW, as in the row of optimizers, with equal weights. The paper's figure "
    "is of all layers, attention and head with them; the bounds are ours",
    axes=Axes("share of channels kept", "times as fast as dense"),
    measure=measure,
    sources=("2506.06644",),
    timed=True,
    settings={"shares": SHARES, "keys": KEYS, "read": KEPT, "steps": STEPS},
)
