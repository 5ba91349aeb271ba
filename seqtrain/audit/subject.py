"""What is audited, as functions: of a model, of a trainer; and what is found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# Tokens and labels `[B,T]` of a micro-batch. A label is the *next* token already; -100 does not count.
MicroBatch = tuple[Tensor, Tensor]
IGNORED = -100
# Parts of the names of parameters that make decays, here and in transformers: a rounding of one changes all memory.
GATES = ("A_log", "dt_bias", "dt_proj.bias", "recurrent_param", "slope_rate", "log_decay")


class NotChecked(Exception):
    """Why a check can't be made on this subject."""


@dataclass(frozen=True)
class Finding:
    """`module`: the first whose output differs, or a parameter; "" where that isn't known. `look`: where to look."""

    check: str
    module: str
    what: str
    look: str

    def __str__(self) -> str:
        return f"{self.check}: {self.module or 'the output'}: {self.what}; look at {self.look}"


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A training program, as functions on runs of its own making; None where it has no such thing.

    start: () -> a new run, always with the same weights. step: one step of the optimizer on micro-batches (or what the
    ranks get); gives the loss. weights: of a run, by name. save, load: a run to a folder and back. draw: the
    micro-batches of a run's next step, where the trainer reads its own data. gradients: of the weights of a new run,
    without a step: (micro-batches) -> (loss, gradients by name); the loss is a mean over all labels that count.
    """

    start: Callable[[], Any]
    step: Callable[[Any, Sequence[MicroBatch]], float]
    weights: Callable[[Any], Mapping[str, Tensor]]
    save: Callable[[Any, Path], None] | None = None
    load: Callable[[Path], Any] | None = None
    draw: Callable[[Any], Sequence[MicroBatch]] | None = None
    gradients: Callable[[Sequence[MicroBatch]], tuple[float, Mapping[str, Tensor]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, as functions of tokens `[B,T]` (int64) that give logits `[B,T,V]`; only `forward` is needed.

    vocabulary: tokens are below it. tokens: in the rows it is tried on, more than its chunks hold. module: the network,
    to name the module in which something is first visible, and for what needs its parameters. step: goes on with a
    cache: (tokens, cache, None at the start) -> (logits, cache). padded: (tokens, mask `[B,T]`, 0 for padding) ->
    logits. packed: by the name of a way to say it, (tokens `[1,T]`, lengths of the documents) -> logits. cut: a row in
    pieces of such lengths, as over segments or ranks, with gradients; by `step` where it is None. cast: the subject in
    another dtype, as it is trained or served. gates: parts of the names of parameters that must stay float32. flops:
    what the forward pass over one row of so many tokens is said to cost, a multiply-add being two.
    """

    forward: Callable[[Tensor], Tensor]
    vocabulary: int
    tokens: int = 101
    module: nn.Module | None = None
    step: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None
    padded: Callable[[Tensor, Tensor], Tensor] | None = None
    packed: Mapping[str, Callable[[Tensor, Sequence[int]], Tensor]] = field(default_factory=dict)
    cut: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    cast: Callable[[Any], "Subject"] | None = None
    gates: tuple[str, ...] = GATES
    flops: Callable[[int], float] | None = None
    trainer: Trainer | None = None
