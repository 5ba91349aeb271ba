"""Layouts that predictions are checked on, and settings that others have published."""

from dataclasses import dataclass

from seqtrain.planning.layout import Layout
from seqtrain.planning.run_config import last_of_each

_SMALL = (
    "model=hybrid_tiny data=stdlib model.width=128 model.depth=4 train.batch_size=1 train.micro_batch_size=1 "
    "parallel.data=1 parallel.zero_stage=0"
)


def layout_words(mixers: str, length: int, words: tuple[str, ...], shorter: int = 1) -> list[str]:
    """The launcher's overrides of a small model of these mixers on sequences of `length / shorter` tokens."""
    length //= shorter
    return last_of_each(*_SMALL.split(), f"model.layers=[{mixers}]", *words, f"train.sequence_length={length}")


_AGAIN, _KEPT = "model.activation_checkpointing=true", "model.activation_checkpointing=false"
_ZERO = tuple(f"parallel.zero_stage={stage}" for stage in range(4))
_FOUR = ("train.batch_size=4", "train.micro_batch_size=2")
_PAIR = ("parallel.data=2", "train.batch_size=2")
# Mixers, lengths from 2k to 64k, 1 to 4 ranks, ZeRO 0 to 3, activations kept and recomputed. The machine's constants
# come from other layouts: two layers of each mixer on 2,048 tokens, and memories of four on 12,288 per rank.
LAYOUTS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("gated_delta_net", 8192, (_KEPT,)),
    ("gla,attention", 2048, (_AGAIN, _ZERO[1], "train.batch_size=4", "train.micro_batch_size=4")),
    ("mamba2", 16384, (_AGAIN,)),
    ("gla", 65536, (_AGAIN, _ZERO[1], "parallel.sequence=2")),
    ("s5,sliding_attention", 16384, (_KEPT, _ZERO[2])),
    ("gated_delta_net,attention", 8192, (_KEPT, _ZERO[1], *_PAIR)),
    ("hgrn2", 32768, (_KEPT, _ZERO[2], "parallel.sequence=4")),
    ("kda", 8192, (_AGAIN, _ZERO[3], *_PAIR)),
    ("retnet", 32768, (_AGAIN, _ZERO[3])),
    ("hgrn", 16384, (_KEPT, "parallel.sequence=2")),
    ("gated_delta_net", 65536, (_AGAIN,)),
    ("gla,sliding_attention", 4096, (_KEPT, _ZERO[1], *_PAIR, "parallel.sequence=2", *_FOUR)),
    ("linear_attention", 16384, (_KEPT, _ZERO[1], "model.width=256")),
    ("mamba2,gated_delta_net", 32768, (_AGAIN, _ZERO[3], "parallel.sequence=2")),
)


@dataclass(frozen=True)
class Case:
    """A published figure of a run with these overrides in this layout.

    `figure`: "tokens per second and GPU", or a ratio of step times: to the step of one rank on its own tokens alone
    ("ratio to one rank"), or of a step with states gathered to one where they are scanned ("ratio to gathering").
    """

    name: str
    source: str
    overrides: tuple[str, ...]
    layout: Layout
    vocab_size: int
    figure: str
    published: float
    discussion: str
    cluster: str = "h100"


_TORCHTITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (Llama 3.1 8B, H100 96 GB HBM2e at 500 W)"
_ZECO = "ZeCO, arXiv 2507.01004: GLA of 1B on GPUs with 400 Gbit/s per GPU between nodes"
# Llama's MLP is wider and its keys and values have fewer heads: this ratio gives a layer as many parameters.
_LLAMA = ("model.layers=[attention]", "model.depth=32", "model.width=4096", "model.heads=32", "model.mlp_ratio=3.0",
          "model.tie_embeddings=false", "train.dtype=bfloat16")  # fmt: skip
_GLA = ("model.layers=[gla]", "model.depth=24", "model.width=2048", "model.heads=4", "train.dtype=bfloat16")

_FLA = "flash-linear-attention, issue 32, its benchmark of training throughput on one H100 (2024)"
_DELTA = ("model.layers=[delta_net]", "model.depth=24", "model.width=2048", "model.heads=16", "model.mlp_ratio=2.75",
          "model.tie_embeddings=false", "train.dtype=bfloat16")  # fmt: skip
_SAMBA = ("model.layers=[mamba2,sliding_attention]", "mixer.sliding_attention.window=2048", "model.depth=18",
          "model.width=2304", "model.heads=18", "model.tie_embeddings=false", "train.dtype=bfloat16")  # fmt: skip
RATE = "tokens per second and GPU"

# fmt: off
CASES: tuple[Case, ...] = (
    Case(
        "8B Transformer, 8,192 tokens, 8 H100",
        f"{_TORCHTITAN}, table 1: fully sharded, eager, some layers checkpointed",
        (*_LLAMA, "train.sequence_length=8192"),
        Layout(8, 1, 3, True, 2, 16), 128256, RATE, 5762.0,
        "There, part of the layers is recomputed, here all or none; weights are gathered in bfloat16 there, in "
        "float32 here; the memory of those GPUs is slower (2.4 TB/s) and their power lower (500 W). That the figures "
        "are close is in part these differences cancelling.",
    ),
    Case(
        "8B Transformer, 8,192 tokens, 128 H100",
        f"{_TORCHTITAN}, table 3: fully sharded, eager, some layers checkpointed",
        (*_LLAMA, "train.sequence_length=8192"),
        Layout(128, 1, 3, True, 2, 256), 128256, RATE, 5605.0,
        "As above. There 128 GPUs lose 3% to 8, since the reduction of gradients hides behind the backward pass and "
        "travels in bfloat16; here float32 gradients are reduced after it, exposed: this prediction is pessimistic.",
    ),
    Case(
        "8B Transformer, 32,768 tokens, 8 H100",
        f"{_TORCHTITAN}, table 2: fully sharded, compiled, float8 products, all layers checkpointed",
        (*_LLAMA, "train.sequence_length=32768"),
        Layout(8, 1, 3, True, 1, 8), 128256, RATE, 3890.0,
        "There code is compiled, which fuses what moves through memory one operator at a time here, and products are "
        "float8, at up to twice the rate; neither is in the prediction, which is optimistic by as much.",
    ),
    Case(
        "8B Transformer, 262,144 tokens, 8 H100",
        f"{_TORCHTITAN}, table 2: one sequence over 8 GPUs, ring attention, all layers checkpointed",
        (*_LLAMA, "train.sequence_length=262144"),
        Layout(1, 8, 3, True, 1, 1), 128256, RATE, 548.0,
        "Softmax attention binds in both. There keys rotate from GPU to GPU, here heads are exchanged and all ranks "
        "have equal work, at the rate of a kernel on one GPU.",
    ),
    Case(
        "1B GLA, 16,384 tokens per GPU on 64 GPUs over one GPU",
        f"{_ZECO}, abstract: 1M tokens on 64 take about as long as 16k on one",
        (*_GLA, "train.sequence_length=1048576"),
        Layout(1, 64, 1, True, 1, 1), 32000, "ratio to one rank", 1.0,
        "The reduction of gradients is left out here; the published sentence is taken to mean that too. The wave of "
        "scans adds a little, and 64 ranks divide the optimizer's work among them, which a single one does alone: so "
        "the ratio may fall below 1.",
    ),
    Case(
        "1B GLA, 8,388,608 tokens, 256 GPUs, states gathered over states scanned",
        f"{_ZECO}, abstract: 60% faster than gathering (LASP-2) at 8M tokens on 256",
        (*_GLA, "train.sequence_length=8388608"),
        Layout(1, 256, 1, True, 1, 1), 32000, "ratio to gathering", 1.6,
        "No blind prediction: heads are four because that makes the state of 2 MiB that their table of All-Scan's "
        "times fits, and gathering is assumed not to overlap with compute because then the ratio is theirs. With "
        "overlap, as in this project, it hides at this size, and the ratio is 1.",
    ),
    Case(
        "1.3B DeltaNet, 32,768 tokens, one H100",
        f"{_FLA}: delta-net",
        (*_DELTA, "train.sequence_length=32768"),
        Layout(1, 1, 0, False, 1, 1), 32000, RATE, 20419.72,
        "There weights are bfloat16 and one kernel makes most steps of a norm or a gate; here weights are float32 and "
        "cast at each use, and what moves through memory is counted as the PyTorch forms move it. The recurrence's "
        "kernels are taken to run at one rate; those of 2024 have become faster since. Nothing was fitted to it.",
    ),
    Case(
        "1.3B hybrid of Mamba and a window of 2,048, 32,768 tokens, one H100",
        f"{_FLA}: samba",
        (*_SAMBA, "train.sequence_length=32768"),
        Layout(1, 1, 0, False, 1, 1), 32000, RATE, 28904.69,
        "The nearest to a hybrid of 7B at this length for which a figure was found. There the layers are Mamba's "
        "first form with a state of 16, here Mamba-2's with one of 128, which is more products; a window's attention "
        "is taken to run at the rate of full attention. Nothing was fitted to it.",
    ),
)
# fmt: on
