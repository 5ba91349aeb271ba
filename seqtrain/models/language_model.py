"""The network: embedding, blocks of the pattern `layers`, a norm, and a head that never holds all logits."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.initialization import Fill, drawn, initializers_of, materialize_all, normal, scaled
from seqtrain.kernels.linear_cross_entropy import linear_cross_entropy, soft_cap
from seqtrain.kernels.linear_cross_entropy.chunked import chunk_by_chunk
from seqtrain.kernels.products import linear
from seqtrain.layers import RMSNorm, upcast
from seqtrain.mixers import WHOLE, Mixer, State
from seqtrain.models.block import build_blocks
from seqtrain.models.config import ModelConfig
from seqtrain.models.descriptor import SpatialDescriptor
from seqtrain.models.feed_forward import MLP, MoE
from seqtrain.models.rounded_states import RoundedStates, rounded_bytes
from seqtrain.models.spark import SparkMLP
from seqtrain.parallel.both_ways import BothWays
from seqtrain.parallel.recompute import recomputed
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.tensor import ALONE, TensorParallel, softmax_of_parts
from seqtrain.validation import validate

# One a layer.
States = list[State] | RoundedStates


class Embedding(nn.Embedding):
    """`nn.Embedding` of whose rows each of `tensor`'s ranks has its part."""

    def __init__(self, vocab: int, width: int, tensor: TensorParallel):
        self.first, end = tensor.span(vocab)
        super().__init__(end - self.first, width)
        self.tensor = tensor

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tensor.count == 1:
            return super().forward(tokens)
        own = (tokens >= self.first) & (tokens < self.first + len(self.weight))
        return self.tensor.leave(super().forward((tokens - self.first).where(own, 0)) * own[..., None])


class Head(nn.Module):
    """The matrix `[vocab, D]` that scores next tokens. Tied, it holds the embedding's own parameter.

    A parameter that two modules hold is gathered for both by ZeRO-3, which an access from outside would not be.
    `tensor`: ranks that have rows of it, of `vocab` in all.
    """

    def __init__(
        self, weight: Tensor, chunk: int, *, vocab: int, tensor: TensorParallel, scale: float = 1.0, cap: float = 0.0
    ):
        super().__init__()
        self.weight, self.vocab, self.tensor = weight, vocab, tensor
        self.chunk, self.scale, self.cap = chunk, scale, cap
        # Where a list, each call with labels adds the loss of every token, float32 `[n]`.
        self.losses: list[Tensor] | None = None

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """`[...,D]` -> float32 logits `[...,vocab]`, or the loss summed over labels that are not -100."""
        hidden = self.tensor.enter(hidden if self.scale == 1 else hidden * self.scale)
        if labels is not None:
            rows = hidden.flatten(0, -2)
            losses = None
            if self.losses is not None:
                losses = torch.zeros(len(rows), device=rows.device)
                self.losses.append(losses)
            labels = labels.flatten()
            if (group := self.tensor.group) is not None:
                softmax = partial(softmax_of_parts, first=self.tensor.span(self.vocab)[0], group=group)
                return chunk_by_chunk(rows, self.weight, labels, self.chunk, self.cap, losses, softmax)
            return linear_cross_entropy(rows, self.weight, labels, chunk=self.chunk, cap=self.cap, losses=losses)
        logits = linear(hidden, self.weight).to(torch.promote_types(hidden.dtype, torch.float32))
        return soft_cap(self.tensor.join(logits, self.vocab), self.cap)


class LanguageModel(nn.Module):
    """A causal language model of any mixers. Weight decay belongs on parameters of two dimensions or more."""

    def __init__(
        self,
        config: ModelConfig,
        mixers: Mapping[str, Any],
        vocab_size: int,
        *,
        seed: int | None = None,
        tensor: TensorParallel = ALONE,
    ):
        """`mixers`: the `Config` of mixers in `config.layers`, by name; those left out have their defaults.

        The initial weights follow from `seed`; where it is None, from `torch.manual_seed`. `tensor`: ranks that divide
        the layers; then this rank's part is built on the meta device, see `divided.py`. Raises `ConfigError`.
        """
        super().__init__()
        validate(ModelConfig, asdict(config), prefix="model.")
        if 0 < config.vocab_size < vocab_size:
            raise ConfigError(f"model.vocab_size={config.vocab_size}: the tokenizer has {vocab_size} ids")
        self.config, self.mixers, self.tensor = config, mixers, tensor
        self.vocab_size = vocab_size = config.vocab_size or vocab_size
        device = torch.get_default_device()
        # Without memory, and without numbers that would be drawn to be thrown away.
        with torch.device("meta"):
            self.embedding = Embedding(vocab_size, config.width, tensor)
            norm = partial(RMSNorm, eps=config.norm_eps, zero_centered=config.norm_zero_centered)
            self.descriptor = None
            if config.descriptor:
                self.descriptor = SpatialDescriptor(config.width, config.descriptor, causal=config.kind == "decoder")
            self.blocks: Any = nn.ModuleList(build_blocks(config, mixers, norm, tensor))
            self.norm = norm(config.width)
            tied = config.tie_embeddings
            weight = self.embedding.weight if tied else nn.Parameter(torch.empty_like(self.embedding.weight))
            options = {"scale": config.logit_scale, "cap": config.logit_cap}
            self.head = Head(weight, config.loss_chunk, vocab=vocab_size, tensor=tensor, **options)
        # What `save_pretrained` needs of one that came from `from_pretrained`.
        self.origin: Any = None
        if device.type != "meta":
            seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
            materialize_all(self, self.initial_weights(seed), device)

    def initial_weights(self, seed: int) -> Fill:
        """Normal matrices, zero biases, what each mixer sets by its own rule, then the residual scaling.

        Numbers follow from `seed` and the parameter's name alone.
        """
        rules = initializers_of(self, deviation := self.config.initializer_range)
        rules[self.head.weight] = normal(deviation)
        for module in self.modules():
            if isinstance(module, MoE):
                rules |= dict.fromkeys((module.up, module.down), normal(deviation))
            elif isinstance(module, SparkMLP):
                rules |= dict.fromkeys((module.value, module.down), normal(deviation))
        mixers = [part for part in self.modules() if isinstance(part, Mixer) and part.out is not None]
        fed = [part.last for part in self.modules() if isinstance(part, MLP | MoE | SparkMLP)]
        # So many sums of independent terms keep the residual stream at the size of one (GPT-2).
        scale = (2 * self.config.depth) ** -0.5
        # What layers share is scaled once.
        for last in dict.fromkeys([*(part.out.weight for part in mixers), *fed]):
            rules[last] = scaled(rules[last], scale)
        return drawn(self, rules, seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        state: States | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        all_logits: bool = False,
        keep_state: bool = False,
    ) -> Any:
        """The loss summed over `labels`, which are the *next* tokens already; without them, the last position's logits.

        tokens: int64 `[B,T]`, or `[B]` for one token per row.
        labels: int64 `[B,T]`, `tokens` one place further on; -100 does not count. The loss is a float32 scalar, a sum
            over tokens and not their mean; with `keep_state` the state after the last token comes with it.
        Without labels: float32 logits `[B,vocab]` (of all positions, `[B,T,vocab]`, with `all_logits`), and that
            state, one dict per layer.
        state: the same before the first token; None for an empty past.
        """
        x, after = self.hidden(tokens, state, sequence=sequence, keep_state=keep_state or labels is None)
        if labels is not None:
            loss = self.head(x, labels)
            return (loss, after) if keep_state else loss
        return self.head(x if x.dim() == 2 or all_logits else x[:, -1]), after

    def hidden(
        self,
        tokens: Tensor,
        state: States | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        keep_state: bool = True,
        watch: Callable[[Tensor], None] = lambda x: None,
    ) -> tuple[Tensor, Any]:
        """What the head is given for `tokens: int64 [B,T]` or `[B]`: `[B,T,D]` or `[B,D]`, and the state after them.

        `tokens` may be their embeddings, too: floating, `[B,T,D]`. `watch` is shown what enters every block. Rounded
        states give rounded ones.
        """
        if self.config.kind == "encoder":
            if state is not None or tokens.dim() == 1:
                raise ValueError(
                    "model.kind=encoder: reads whole sequences, and neither goes on from a state nor steps"
                )
            sequence = BothWays.of(sequence)
        past: Iterable[State | None] = [None] * len(self.blocks) if state is None else state
        x = self._stream(tokens)  # B T D
        after: Any = state.following(x[..., 0].shape[-1]) if isinstance(state, RoundedStates) else []
        if self.descriptor is not None:
            if state is not None or tokens.is_floating_point():
                raise ValueError("model.descriptor: a point's neighbors are looked for among tokens of whole rows")
            x = self.descriptor(x, tokens, sequence.one_way)
        first = x if any(block.shared is not None for block in self.blocks) else None
        for block, before in zip(self.blocks, past, strict=True):
            watch(x)
            x, new = self._run(block, x, before, sequence, first, keep_state)
            # Training drops states at once: those of full attention are as long as the sequence.
            if keep_state:
                after.append(new)
        return self.norm(x), after

    def _stream(self, tokens: Tensor) -> Tensor:
        """What enters the first block."""
        x = tokens if tokens.is_floating_point() else self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # Rows of bfloat16 weights begin a stream of float32 all the same.
            x = upcast(x)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def through(self, x: Tensor, first: int, last: int | None, *, sequence: SequenceContext = WHOLE) -> Tensor:
        """What leaves block `last - 1`, or the last one, `[B,T,D]`, of `x`: what enters block `first`, or tokens for 0.

        For models without shared blocks.
        """
        x = x if x.is_floating_point() else self._stream(x)
        for block in self.blocks[first:last]:
            x, _ = self._run(block, x, None, sequence, None, False)
        return x

    def step(
        self, tokens: Tensor, state: list[State], *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, list[State]]:
        """One token for each row: `tokens: int64 [B]` -> `([B,vocab], state)`; `state` stays as it is.

        On a CPU, without gradients, by the native library where it can be (`seqtrain.models.decoding`).
        """
        # It has the blocks' parts, and imports what most models never need.
        from seqtrain.models import decoding

        found = decoding.step(self, tokens, state, sequence)
        return self(tokens, state=state, sequence=sequence) if found is None else found

    def _run(
        self,
        block: Any,
        x: Tensor,
        state: State | None,
        sequence: SequenceContext,
        first: Tensor | None,
        keep_state: bool,
    ) -> tuple[Tensor, State]:
        run = partial(block, sequence=sequence, first=first, keep_state=keep_state)
        if "block" not in self.config.recomputed or not torch.is_grad_enabled():
            return run(x, state)
        sends = sequence.sends or (block.mlp is not None and block.mlp.sends)
        return recomputed(run, x, state, keep="sent", sends=sends, inputs=block.inputs)

    def parameter_count(self) -> int:
        """Numbers that are learned, those that two modules share counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, tokens: int) -> int:
        """Forward pass with loss over one sequence: every block's, and `2 T D vocab` of the head."""
        blocks = sum(block.mixer_flops(tokens) + block.mlp_flops(tokens) for block in self.blocks)
        return blocks + 2 * tokens * self.config.width * len(self.head.weight)

    def state_bytes(self, tokens: int, *, bits: int = 0) -> int:
        """Bytes of one row's state after `tokens` tokens, in float32: the same for any number where mixers recur.

        `bits`: with that `generation.state_bits`.
        """
        return sum(rounded_bytes(block.state(tokens), bits) for block in self.blocks)
