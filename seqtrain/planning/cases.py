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
    """A published figure of a run with these overrides in this layout; docs/performance.md says where it is from.

    `figure`: "tokens/s and GPU", or a ratio of step times: to the step of one rank on its own tokens alone ("of one
    rank"), or of a step with states gathered to one where they are scanned ("of gathering").
    """

    name: str
    overrides: tuple[str, ...]
    layout: Layout
    vocab_size: int
    figure: str
    published: float
    cluster: str = "h100"


# Llama's MLP is wider and its keys and values have fewer heads: this ratio gives a layer as many parameters.
_LLAMA = ("model.layers=[attention]", "model.depth=32", "model.width=4096", "model.heads=32", "model.mlp_ratio=3.0",
          "model.tie_embeddings=false", "train.dtype=bfloat16")  # fmt: skip
_GLA = ("model.layers=[gla]", "model.depth=24", "model.width=2048", "model.heads=4", "train.dtype=bfloat16")
_DELTA = ("model.layers=[delta_net]", "model.depth=24", "model.width=2048", "model.heads=16", "model.mlp_ratio=2.75",
          "model.tie_embeddings=false", "train.dtype=bfloat16")  # fmt: skip
_SAMBA = ("model.layers=[mamba2,sliding_attention]", "mixer.sliding_attention.window=2048", "model.depth=18",
          "model.width=2304", "model.heads=18", "model.tie_embeddings=false", "train.dtype=bfloat16")  # fmt: skip
RATE = "tokens/s and GPU"


def _case(name: str, model: tuple[str, ...], tokens: int, layout: Layout, vocab: int, *published: str | float) -> Case:
    figure, value = published
    return Case(name, (*model, f"train.sequence_length={tokens}"), layout, vocab, str(figure), float(value))


# fmt: off
CASES: tuple[Case, ...] = (
    _case("8B Transformer, 8k, 8 GPUs", _LLAMA, 8192, Layout(8, 1, 3, True, 2, 16), 128256, RATE, 5762),
    _case("8B Transformer, 8k, 128 GPUs", _LLAMA, 8192, Layout(128, 1, 3, True, 2, 256), 128256, RATE, 5605),
    _case("8B Transformer, 32k, 8 GPUs", _LLAMA, 32768, Layout(8, 1, 3, True, 1, 8), 128256, RATE, 3890),
    _case("8B Transformer, 256k, 8 GPUs", _LLAMA, 262144, Layout(1, 8, 3, True, 1, 1), 128256, RATE, 548),
    _case("1B GLA, 1M, 64 GPUs", _GLA, 1048576, Layout(1, 64, 1, True, 1, 1), 32000, "of one rank", 1.0),
    _case("1B GLA, 8M, 256 GPUs", _GLA, 8388608, Layout(1, 256, 1, True, 1, 1), 32000, "of gathering", 1.6),
    _case("1.3B DeltaNet, 32k, 1 GPU", _DELTA, 32768, Layout(1, 1, 0, False, 1, 1), 32000, RATE, 20419.72),
    _case("1.3B Samba, 32k, 1 GPU", _SAMBA, 32768, Layout(1, 1, 0, False, 1, 1), 32000, RATE, 28904.69),
)
# fmt: on
