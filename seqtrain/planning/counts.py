"""What a model costs, part by part, without allocating it: parameters, FLOPs, bytes of state, bytes kept for backward.

Parameters, model FLOPs and state bytes are what mixers and blocks say of themselves; the rest depends on the code that
runs, and is found by tracing. Everything is for `rows` sequences of `tokens` tokens on one rank.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.language_model import Block
from seqtrain.planning.parts import SMALL, MicroBatch, Traced, trace_layer, trace_outside


@dataclass(frozen=True, kw_only=True)
class PartCounts(Traced):
    """One part of the model, its norm and the sum with the residual stream included.

    `layer`: from 0; -1 outside of the layers. `part`: "embedding", "mixer", "mlp" or "loss" (with the last norm and the
    head). `kind`: the mixer's name, or "". `parameters`: numbers the part alone holds. `forward_flops`,
    `backward_flops`: the model's own (a multiply-add is two), each operator's recurrence counted as it is defined.
    `state_bytes`: of one row after the tokens, as generation carries it.
    """

    layer: int
    part: str
    kind: str = ""
    parameters: int
    forward_flops: float
    backward_flops: float
    state_bytes: int = 0

    @property
    def saved_bytes(self) -> float:
        """Bytes kept from the forward to the backward pass; the part's output is counted here."""
        return float(self.forward.kept[0])

    def of_rows(self, rows: int) -> "PartCounts":
        """The counts of `rows` times as many rows."""
        backward = self.backward.times(rows)
        # The gradients of weights do not grow with the rows.
        backward.kept -= (rows - 1) * self.gradient_bytes
        numbers = ("forward_flops", "backward_flops", "executed_forward", "executed_backward")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name) * rows for name in numbers},
            forward=self.forward.times(rows),
            backward=backward,
            exchanges=tuple(each.of_rows(rows) for each in self.exchanges),
        )


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
        """Model FLOPs of forward and backward pass: what MFU is counted by."""
        return sum(part.forward_flops + part.backward_flops for part in self.parts)

    def executed_flops(self, *, checkpointing: bool) -> float:
        """FLOPs that really run in a step: of chunk forms, and of recomputed forward passes."""
        again = [part.executed_forward for part in self.parts if part.layer >= 0] if checkpointing else []
        return sum(part.executed_forward + part.executed_backward for part in self.parts) + sum(again)

    def saved_bytes(self, *, checkpointing: bool) -> float:
        """Activations held when the forward pass has ended: all that is kept, or the residual stream of each layer."""
        return float(self.saved(checkpointing=checkpointing)[0])

    def peak_bytes(self, *, checkpointing: bool) -> float:
        """Most bytes of activations, temporaries and gradients made so far at any moment of the two passes."""
        return float(self.peak(checkpointing=checkpointing)[0])

    @property
    def layers(self) -> list[list[PartCounts]]:
        """The parts of each layer."""
        count = 1 + max((part.layer for part in self.parts), default=-1)
        return [[part for part in self.parts if part.layer == layer] for layer in range(count)]

    def small_bytes(self, *, checkpointing: bool) -> tuple[float, float]:
        """Bytes in blocks that an allocator keeps: kept from the forward to the backward pass, and passing.

        Of blocks on the edge, which go where smaller ones have left room, as many count as there are small ones.
        """
        _, kept, edge_kept = self.saved(checkpointing=checkpointing).tolist()
        _, peak, edge_peak = self.peak(checkpointing=checkpointing).tolist()
        share = peak / edge_peak if edge_peak else 1.0
        peak += share * (edge_peak - peak)
        kept = min(kept + share * (edge_kept - kept), peak)
        return kept, peak - kept

    def of_rows(self, rows: int) -> "ModelCounts":
        """The counts of `rows` times as many rows, all work and activations in proportion."""
        parts = tuple(part.of_rows(rows) for part in self.parts)
        return ModelCounts(parts, self.tokens, self.rows * rows, self.dtype, self.stream_bytes * rows)

    def saved(self, *, checkpointing: bool) -> np.ndarray:
        """`saved_bytes` by kind of block, `[3]`, as in `Recorded`."""
        kept = [part.forward.kept for part in self.parts if not checkpointing or part.layer < 0]
        return sum(kept, np.zeros(3)) + self._stream * len(self.layers) * checkpointing

    def peak(self, *, checkpointing: bool) -> np.ndarray:
        """`peak_bytes` by kind of block, `[3]`, as in `Recorded`."""
        held = peak = np.zeros(3)
        for part in self.parts:
            peak = np.maximum(peak, held + part.forward.peak)
            inside = checkpointing and part.layer >= 0
            held = held + (self._stream * (part.part == "mlp") if inside else part.forward.kept)
        # What is recomputed together: each layer; the embedding and the loss stand alone.
        for group in ([self.parts[-1]], *reversed(self.layers), [self.parts[0]]):
            again, inside = np.zeros(3), checkpointing and group[0].layer >= 0
            for part in group if inside else ():
                peak = np.maximum(peak, held + again + part.forward.peak)
                again = again + part.forward.kept
            # A part's output goes when its gradient, which is as large, has come.
            held = held + (again - self._stream * inside)
            for part in reversed(group):
                peak = np.maximum(peak, held + part.backward.peak)
                held = held + (part.gradient_bytes - part.forward.kept)
        return peak

    @property
    def _stream(self) -> np.ndarray:
        """Bytes of one tensor of the residual stream, `[3]`, as in `Recorded`."""
        return self.stream_bytes * np.array([1, self.stream_bytes < SMALL, self.stream_bytes <= SMALL])


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
    batch = MicroBatch(tokens, rows, dtype, backend)
    parts: list[PartCounts] = []

    def add(layer: int, part: str, modules: list[nn.Module], flops: float, traced: Traced, **more: Any) -> None:
        # Each product of the forward pass has two in the backward pass, one for each factor.
        numbers: dict[str, Any] = {"forward_flops": flops, "backward_flops": 2 * flops}
        numbers["parameters"] = sum(weight.numel() for module in modules for weight in module.parameters())
        parts.append(PartCounts(**vars(traced), layer=layer, part=part, **numbers, **more))

    embedding, loss = trace_outside(model, vocab_size, batch)
    if model.tie_embeddings:
        # The head has made that gradient; the embedding adds to it.
        embedding = dataclasses.replace(embedding, gradient_bytes=0)
    add(-1, "embedding", [whole.embedding], 0.0, embedding)
    kinds: dict[tuple[str, int], tuple[Traced, Traced]] = {}
    for index, block in enumerate(whole.blocks):
        assert isinstance(block, Block), block
        name = model.layers[index % len(model.layers)]
        kind = (name, block.group)
        if kind not in kinds:
            kinds[kind] = trace_layer(model, mixers, index, batch)
        mixer, mlp = kinds[kind]
        mlp_flops = 6.0 * rows * tokens * block.width * block.hidden
        states, mixer_flops = block.state_bytes(tokens), rows * block.flops(tokens) - mlp_flops
        add(index, "mixer", [block.mixer, block.mixer_norm], mixer_flops, mixer, kind=name, state_bytes=states)
        add(index, "mlp", [block.mlp, block.mlp_norm], mlp_flops, mlp)
    head = [] if model.tie_embeddings else [whole.head]
    add(-1, "loss", [whole.norm, *head], 2.0 * rows * tokens * model.width * vocab_size, loss)
    return ModelCounts(tuple(parts), tokens, rows, dtype, rows * tokens * model.width * 4)
