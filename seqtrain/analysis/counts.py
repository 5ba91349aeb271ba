"""What a model costs, part by part, without allocating it: parameters, FLOPs, bytes of state, bytes kept for backward.

Parameters, model FLOPs and state bytes are what mixers and blocks say of themselves. What depends on the code that runs
(FLOPs of chunk forms, bytes moved, activations kept, temporaries) is found by running each kind of layer once on
tensors that hold no numbers. Everything is for `rows` sequences of `tokens` tokens on one rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from seqtrain.analysis.part_trace import SMALL, Batch, Exchange, Traced, trace_layer, trace_outside
from seqtrain.analysis.trace import Work
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.block import Block

# Blocks of memory to count: all, the small ones, or these with those on the edge (see `Tracer`).
Blocks = Literal["all", "small", "edge"]
_SMALL_AND_EDGE: tuple[Blocks, Blocks] = ("small", "edge")


@dataclass(frozen=True)
class PartCounts:
    """One part of the model: the embedding, a layer's mixer or MLP (each with its norm and the sum with the residual
    stream), or the loss (with the last norm and the head).

    `layer`: from 0; -1 outside of the layers. `part`: "embedding", "mixer", "mlp" or "loss". `kind`: the mixer's name,
    or "". `parameters`: numbers the part alone holds, in `tensors` tensors. `gradient_bytes`: of the parameters whose
    gradients it is the first to make. `forward_flops`, `backward_flops`: the model's own (a multiply-add is two), each
    operator's recurrence counted as it is defined. `executed_forward`, `executed_backward`: matrix products of the
    chunk forms, or kernels alike, that really run, without checkpointing's recomputation. `state_bytes`: of one row
    after the tokens, as generation carries it. `forward`, `backward`: what the code does, and the bytes it holds.
    `exchanges`: what operators send where a sequence is cut.
    """

    layer: int
    part: str
    kind: str
    parameters: int
    tensors: int
    gradient_bytes: int
    forward_flops: float
    backward_flops: float
    executed_forward: float
    executed_backward: float
    state_bytes: int
    forward: Work
    backward: Work
    exchanges: tuple[Exchange, ...]

    @property
    def saved_bytes(self) -> float:
        """Bytes kept from the forward to the backward pass; the part's output, which the next one reads, is counted
        here.
        """
        return self.forward.kept


@dataclass(frozen=True)
class ModelCounts:
    """The parts in the order they run, for `rows` sequences of `tokens`; `stream_bytes`: of the residual stream."""

    parts: tuple[PartCounts, ...]
    tokens: int
    rows: int
    dtype: torch.dtype
    stream_bytes: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def state_bytes(self) -> int:
        return sum(part.state_bytes for part in self.parts)

    @property
    def forward_flops(self) -> float:
        return sum(part.forward_flops for part in self.parts)

    @property
    def step_flops(self) -> float:
        """Model FLOPs of forward and backward pass: what utilisation of a machine is counted by."""
        return sum(part.forward_flops + part.backward_flops for part in self.parts)

    def executed_flops(self, *, checkpointing: bool) -> float:
        """FLOPs that really run in a step: of chunk forms, and of forward passes that are computed again."""
        again = [part.executed_forward for part in self.parts if part.layer >= 0] if checkpointing else []
        return sum(part.executed_forward + part.executed_backward for part in self.parts) + sum(again)

    def saved_bytes(self, *, checkpointing: bool, blocks: Blocks = "all") -> float:
        """Activations held when the forward pass has ended: all that is kept, or the residual stream of each layer."""
        if not checkpointing:
            return sum(_kept(part.forward, blocks) for part in self.parts)
        outside = sum(_kept(part.forward, blocks) for part in self.parts if part.layer < 0)
        return outside + self._stream(blocks) * len(self.layers)

    @property
    def layers(self) -> list[list[PartCounts]]:
        """The parts of each layer."""
        count = 1 + max((part.layer for part in self.parts), default=-1)
        return [[part for part in self.parts if part.layer == layer] for layer in range(count)]

    def peak_bytes(self, *, checkpointing: bool, blocks: Blocks = "all") -> float:
        """Most bytes of activations, temporaries and gradients made so far at any moment of a forward and backward
        pass (without parameters, and without gradients of an earlier pass).
        """
        held = peak = 0.0
        stream = self._stream(blocks)
        for part in self.parts:
            peak = max(peak, held + _peak(part.forward, blocks))
            inside = checkpointing and part.layer >= 0
            held += _kept(part.forward, blocks) if not inside else stream * (part.part == "mlp")
        for group in reversed(self._groups()):
            again, inside = 0.0, checkpointing and group[0].layer >= 0
            for part in group if inside else ():
                peak = max(peak, held + again + _peak(part.forward, blocks))
                again += _kept(part.forward, blocks)
            # A part's output goes when its gradient, which is as large, has come.
            held += again - stream * inside
            for part in reversed(group):
                peak = max(peak, held + _peak(part.backward, blocks))
                held += part.gradient_bytes - _kept(part.forward, blocks)
        return peak

    def small_bytes(self, *, checkpointing: bool) -> tuple[float, float]:
        """Bytes in blocks that an allocator keeps: kept from the forward to the backward pass, and passing.

        Blocks on the edge go where smaller ones have left room: as many of them count as there are small ones among
        both.
        """
        kept, edge_kept = (self.saved_bytes(checkpointing=checkpointing, blocks=blocks) for blocks in _SMALL_AND_EDGE)
        peak, edge_peak = (self.peak_bytes(checkpointing=checkpointing, blocks=blocks) for blocks in _SMALL_AND_EDGE)
        share = peak / edge_peak if edge_peak else 1.0
        peak += share * (edge_peak - peak)
        kept = min(kept + share * (edge_kept - kept), peak)
        return kept, peak - kept

    def _stream(self, blocks: Blocks) -> float:
        """Bytes of one tensor of the residual stream, 0 where that is none of these blocks."""
        counted = blocks == "all" or self.stream_bytes < SMALL or (blocks == "edge" and self.stream_bytes == SMALL)
        return self.stream_bytes if counted else 0.0

    def of_rows(self, rows: int) -> "ModelCounts":
        """The counts of `rows` times as many rows, all work and activations in proportion."""
        parts = tuple(_times(part, rows) for part in self.parts)
        return ModelCounts(parts, self.tokens, self.rows * rows, self.dtype, self.stream_bytes * rows)

    def _groups(self) -> list[list[PartCounts]]:
        """What is computed again together: each layer; the embedding and the loss stand alone."""
        return [[self.parts[0]], *self.layers, [self.parts[-1]]]


def _times(part: PartCounts, rows: int) -> PartCounts:
    work = {name: getattr(part, name) * rows for name in _PROPORTIONAL}
    exchanges = tuple(each.of_rows(rows) for each in part.exchanges)
    forward, backward = part.forward.times(rows), part.backward.times(rows)
    # The gradients of weights are no more for more rows.
    more = (rows - 1) * part.gradient_bytes
    fewer = {name: getattr(backward, name) - more for name in ("kept", "small_kept", "edge_kept")}
    backward = dataclasses.replace(backward, **fewer)
    return dataclasses.replace(part, **work, forward=forward, backward=backward, exchanges=exchanges)


_PROPORTIONAL = ("forward_flops", "backward_flops", "executed_forward", "executed_backward")


def _kept(work: Work, blocks: Blocks) -> float:
    return {"all": work.kept, "small": work.small_kept, "edge": work.edge_kept}[blocks]


def _peak(work: Work, blocks: Blocks) -> float:
    return {"all": work.peak, "small": work.small_peak, "edge": work.edge_peak}[blocks]


def count_model(
    model: ModelConfig,
    mixers: Mapping[str, Any],
    vocab_size: int,
    *,
    tokens: int,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> ModelCounts:
    """The counts of a `LanguageModel` of these arguments on `rows` sequences of `tokens` tokens, forward and backward.

    `dtype`: of matrix products, float32 or bfloat16 (by autocast); weights are float32. `backend`: of the operators, as
    the CPU would choose them. Raises `ConfigError` where the model's own rules are broken.
    """
    with torch.device("meta"):
        whole = LanguageModel(model, mixers, vocab_size)
    batch = Batch(tokens, rows, dtype, backend)
    kinds: dict[tuple[str, int], tuple[Traced, Traced]] = {}
    parts = []
    for index, block in enumerate(whole.blocks):
        assert isinstance(block, Block), block
        name = model.layers[index % len(model.layers)]
        kind = (name, block.group)
        if kind not in kinds:
            kinds[kind] = trace_layer(model, mixers, index, batch)
        parts += _layer_counts(index, name, block, batch, kinds[kind])
    embedding, loss = _outside_counts(model, whole, batch)
    stream = rows * tokens * model.width * 4
    return ModelCounts((embedding, *parts, loss), tokens, rows, dtype, stream)


def _layer_counts(index: int, name: str, block: Block, batch: Batch, traced: tuple[Traced, Traced]) -> list[PartCounts]:
    mlp_flops = 6.0 * batch.rows * batch.tokens * block.width * block.hidden
    mixer_flops = batch.rows * block.flops(batch.tokens) - mlp_flops
    mixer_tensors = [*block.mixer.parameters(), *block.mixer_norm.parameters()]
    mlp_tensors = [*block.mlp.parameters(), *block.mlp_norm.parameters()]
    states = block.state_bytes(batch.tokens)
    return [
        _part(index, "mixer", name, mixer_tensors, mixer_flops, states, traced[0]),
        _part(index, "mlp", "", mlp_tensors, mlp_flops, 0, traced[1]),
    ]


def _outside_counts(model: ModelConfig, whole: LanguageModel, batch: Batch) -> tuple[PartCounts, PartCounts]:
    traced_embedding, traced_loss = trace_outside(model, whole.vocab_size, batch)
    tied = model.tie_embeddings
    embedding, head = list(whole.embedding.parameters()), [] if tied else list(whole.head.parameters())
    flops = 2.0 * batch.rows * batch.tokens * model.width * whole.vocab_size
    first = _part(-1, "embedding", "", embedding, 0.0, 0, traced_embedding)
    if tied:
        # The head has made that gradient; the embedding adds to it.
        first = dataclasses.replace(first, gradient_bytes=0)
    return first, _part(-1, "loss", "", [*whole.norm.parameters(), *head], flops, 0, traced_loss)


def _part(
    layer: int, part: str, kind: str, tensors: Sequence[Tensor], flops: float, state_bytes: int, traced: Traced
) -> PartCounts:
    return PartCounts(
        layer,
        part,
        kind,
        parameters=sum(tensor.numel() for tensor in tensors),
        tensors=len(tensors),
        gradient_bytes=traced.gradient_bytes,
        forward_flops=flops,
        # Each product of the forward pass has two in the backward pass, one for each factor.
        backward_flops=2 * flops,
        executed_forward=traced.executed_forward,
        executed_backward=traced.executed_backward,
        state_bytes=state_bytes,
        forward=traced.forward,
        backward=traced.backward,
        exchanges=traced.exchanges,
    )
