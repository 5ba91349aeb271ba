"""What a model costs, part by part, without allocating it: parameters, FLOPs, bytes of state, bytes kept for backward.

Parameters, model FLOPs and state bytes are what mixers and blocks say of themselves; the rest depends on the code that
runs, and is found by tracing. Everything is for `rows` sequences of `tokens` tokens on one rank.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.feed_forward import MoE
from seqtrain.models.rounded_states import STATE_BITS, rounded_bytes
from seqtrain.parallel.tensor import ALONE, TensorParallel
from seqtrain.planning.parts import MicroBatch, PartTracer, Traced
from seqtrain.planning.trace import Recorded


@dataclass(frozen=True, kw_only=True)
class PartCounts(Traced):
    """One part of the model, its norm and the sum with the residual stream included.

    `layer`: from 0; -1 outside of the layers. `part`: "embedding", "mixer", "mlp" or "loss" (with the last norm and the
    head). `kind`: the mixer's name, or "". `parameters`: numbers the part alone holds, of which `trained` are.
    `forward_flops`, `backward_flops`: the model's own (a multiply-add is two), each operator's recurrence counted as it
    is defined; products of adapters, a few percent, are among those that run alone. `state_bytes`: of one row after the
    tokens, as generation carries it; `rounded_state_bytes`: with so many `generation.state_bits`.
    `reads_first`: whether it is given what entered the first layer, too. `experts`: of the parameters, those of routed
    experts; `routed_bytes`: of the tokens' copies that these work on.
    """

    layer: int
    part: str
    kind: str = ""
    parameters: int
    trained: int
    forward_flops: float
    backward_flops: float
    state_bytes: int = 0
    rounded_state_bytes: Mapping[int, int] = field(default_factory=dict)
    reads_first: bool = False
    experts: int = 0
    routed_bytes: float = 0.0

    @property
    def saved_bytes(self) -> float:
        """Bytes kept from the forward to the backward pass; the part's output is counted here."""
        return self.forward.kept

    def of_rows(self, rows: int, times: Callable[[Recorded], Recorded]) -> "PartCounts":
        """The counts of `rows` times as many rows; `times`: of what was recorded."""
        backward = times(self.backward)
        # The gradients of weights do not grow with the rows.
        backward = dataclasses.replace(backward, kept=backward.kept - (rows - 1) * self.gradient_bytes)
        numbers = ("forward_flops", "backward_flops", "executed_forward", "executed_backward", "routed_bytes")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name) * rows for name in numbers},
            forward=times(self.forward),
            backward=backward,
            exchanges=tuple(each.of_rows(rows) for each in self.exchanges),
        )


@dataclass(frozen=True)
class ModelCounts:
    """The parts in the order they run, for `rows` sequences of `tokens`; `stream_bytes`: of what enters a layer, as it
    is kept where layers are recomputed.
    """

    parts: tuple[PartCounts, ...]
    tokens: int
    rows: int
    dtype: torch.dtype
    stream_bytes: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def experts(self) -> int:
        """Of the parameters, those of routed experts."""
        return sum(part.experts for part in self.parts)

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.parameters - self.trained

    @property
    def state_bytes(self) -> int:
        return sum(part.state_bytes for part in self.parts)

    def rounded_state_bytes(self, bits: int) -> int:
        """With so many `generation.state_bits`."""
        return sum(part.rounded_state_bytes.get(bits, 0) for part in self.parts)

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
        kept = sum(part.forward.kept for part in self.parts if not checkpointing or part.layer < 0)
        return kept + self.stream_bytes * len(self.layers) * checkpointing

    def peak_bytes(self, *, checkpointing: bool) -> float:
        """Most bytes of activations, temporaries and gradients made so far at any moment of the two passes."""
        held = peak = waiting = 0.0
        for part in self.parts:
            peak = max(peak, held + part.forward.peak)
            inside = checkpointing and part.layer >= 0
            held += self.stream_bytes * (part.part == "mlp") if inside else part.forward.kept
        # What is recomputed together: each layer; the embedding and the loss stand alone.
        for group in ([self.parts[-1]], *reversed(self.layers), [self.parts[0]]):
            again, inside = 0.0, checkpointing and group[0].layer >= 0
            for part in group if inside else ():
                peak = max(peak, held + again + part.forward.peak)
                again += part.forward.kept
            # A part's output goes when its gradient, which is as large, has come.
            held += again - self.stream_bytes * inside
            for part in reversed(group):
                peak = max(peak, held + part.backward.peak)
                held += part.gradient_bytes - part.forward.kept
            if not waiting and any(part.reads_first for part in group):
                # The gradient of what entered the first layer waits until all have added to it.
                held += (waiting := self.stream_bytes)
        return peak

    @property
    def layers(self) -> list[list[PartCounts]]:
        """The parts of each layer."""
        count = 1 + max((part.layer for part in self.parts), default=-1)
        return [[part for part in self.parts if part.layer == layer] for layer in range(count)]

    def of_rows(self, rows: int) -> "ModelCounts":
        """The counts of `rows` times as many rows, all work and activations in proportion."""
        known: dict[int, Recorded] = {}

        def times(recorded: Recorded) -> Recorded:
            # Layers of a kind have one.
            if id(recorded) not in known:
                known[id(recorded)] = recorded.times(rows)
            return known[id(recorded)]

        parts = tuple(part.of_rows(rows, times) for part in self.parts)
        return ModelCounts(parts, self.tokens, self.rows * rows, self.dtype, self.stream_bytes * rows)


class ModelCounter:
    """Counts a `LanguageModel` of these arguments for any number of tokens; its parts are traced once.

    `dtype`: of matrix products, float32 or bfloat16 (by autocast); weights are float32. `backend`: of the operators, as
    the CPU would choose them. `adapt` puts adapters on the model, if any. `tensor`: of which rank's part is counted.
    Raises `ConfigError` where the model's own rules are broken.
    """

    def __init__(
        self,
        model: ModelConfig,
        mixers: Mapping[str, Any],
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        adapt: Callable[[LanguageModel], None] = lambda model: None,
        tensor: TensorParallel = ALONE,
    ) -> None:
        with torch.device("meta"):
            self.model = LanguageModel(model, mixers, vocab_size, tensor=tensor)
            adapt(self.model)
        self.dtype, self.backend = dtype, backend
        self._tracer = PartTracer(self.model)

    def count(self, tokens: int, rows: int = 1) -> ModelCounts:
        """`rows` sequences of `tokens` tokens, forward and backward."""
        whole, config, trace = self.model, self.model.config, self._tracer
        adapted = not whole.embedding.weight.requires_grad
        batch = MicroBatch(tokens, rows, self.dtype, self.backend)
        parts: list[PartCounts] = []
        # What several parts hold is the first one's.
        counted: set[nn.Parameter] = set()
        held: list[set[nn.Parameter]] = []

        def add(layer: int, part: str, modules: list[nn.Module], flops: float, traced: Traced, **more: Any) -> None:
            own = {weight for module in modules for weight in module.parameters()}
            numbers: dict[str, Any] = {"parameters": sum(weight.numel() for weight in own - counted)}
            numbers["trained"] = sum(weight.numel() for weight in own - counted if weight.requires_grad)
            counted.update(own)
            held.append({weight for weight in own if weight.requires_grad})
            # Each product of the forward pass has two in the backward pass, one for each factor that has a gradient. Of
            # a mixer, some are none with weights.
            frozen = min(flops, 2.0 * rows * tokens * _frozen(modules)) if part == "mixer" else flops * adapted
            numbers |= {"forward_flops": flops, "backward_flops": 2 * flops - frozen}
            parts.append(PartCounts(**vars(traced), layer=layer, part=part, **numbers, **more))

        embedding = trace.embedding(batch)
        if config.tie_embeddings:
            # The head has made that gradient; the embedding adds to it.
            embedding = dataclasses.replace(embedding, gradient_bytes=0)
        add(-1, "embedding", [whole.embedding], 0.0, embedding)
        mixers = {kind: trace.mixer(kind, batch) for kind in trace.mixers}
        mlps = {kind: trace.mlp(kind, batch) for kind in trace.mlps}
        for index, block in enumerate(whole.blocks):
            if block.mixer is not None:
                modules, kind = [block.mixer, block.mixer_norm, block.mixer_post_norm], trace.kind(index)
                modules += [block.shared] if block.shared is not None else []
                flops, state = float(rows * block.mixer_flops(tokens)), block.state(tokens)
                sizes: dict[str, Any] = {"state_bytes": rounded_bytes(state, 0)}
                sizes["rounded_state_bytes"] = {bits: rounded_bytes(state, bits) for bits in STATE_BITS}
                sizes["reads_first"] = block.shared is not None
                add(index, "mixer", modules, flops, mixers[kind], kind=kind[0], **sizes)
            if block.mlp is not None:
                modules, flops = [block.mlp, block.mlp_norm, block.mlp_post_norm], float(rows * block.mlp_flops(tokens))
                routed: dict[str, Any] = {}
                if isinstance(block.mlp, MoE):
                    experts = block.mlp.up.numel() + block.mlp.down.numel()
                    copies = rows * tokens * block.mlp.chosen
                    routed = {"experts": experts, "routed_bytes": 4.0 * copies * block.mlp.up.shape[2]}
                add(index, "mlp", modules, flops, mlps[config.mlp(index)], **routed)
        loss_flops = 2.0 * rows * tokens * whole.head.weight.numel()
        add(-1, "loss", [whole.norm, whole.head], loss_flops, trace.loss(batch))
        # Of what several layers hold, the last one's backward pass is the first to make the gradient.
        made: set[nn.Parameter] = set()
        for number in reversed(range(len(parts))):
            if parts[number].layer >= 0:
                again = sum(weight.nbytes for weight in held[number] & made)
                gradients = parts[number].gradient_bytes - again
                parts[number] = dataclasses.replace(parts[number], gradient_bytes=gradients)
                made |= held[number]
        return ModelCounts(tuple(parts), tokens, rows, self.dtype, rows * tokens * config.width * 4)


def _frozen(modules: list[nn.Module]) -> int:
    """Numbers of the matrices in `modules` that are not trained."""
    linears = {each for module in modules for each in module.modules() if isinstance(each, nn.Linear)}
    return sum(linear.weight.numel() for linear in linears if not linear.weight.requires_grad)
