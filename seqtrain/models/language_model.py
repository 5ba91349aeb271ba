"""The network: embedding, blocks of the pattern `layers`, a norm, and a head that never holds all logits.

A block is a mixer over time, then an MLP over channels, each normalised before and added after.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqtrain.errors import ConfigError
from seqtrain.kernels import linear_cross_entropy
from seqtrain.layers import RMSNorm, ShortConvolution
from seqtrain.mixers import MIXERS, WHOLE, LayerShape, Mixer, State
from seqtrain.models.spiking import Spikes
from seqtrain.parallel.scan import checkpoint_contexts
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.validation import validate


@dataclass(frozen=True)
class ModelConfig:
    """The keys under `model.`; the files in `conf/model/` hold one ready choice each."""

    # Names of mixers (files in seqtrain/mixers/), repeated over the depth.
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("gated_delta_net",)
    # Number of blocks.
    depth: Annotated[int, Field(gt=0)] = 12
    # Channels of the residual stream.
    width: Annotated[int, Field(gt=0)] = 768
    # Heads of every mixer; must divide width.
    heads: Annotated[int, Field(gt=0)] = 12
    # Tokens in the groups each layer is confined to, repeated over the depth; 0: the whole sequence.
    groups: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    # Hidden channels of the MLP over width, rounded to a multiple of 8 channels.
    mlp_ratio: Annotated[float, Field(gt=0)] = 2.6667
    # Mean spikes per value where the MLP computes on spike counts (SpikingBrain); 0: no spikes, plain activations.
    spike_rate: Annotated[float, Field(ge=0)] = 0.0
    # True: the head uses the embedding's matrix, which saves vocab * width parameters.
    tie_embeddings: bool = True
    # True: a block's activations are computed again in the backward pass instead of kept.
    activation_checkpointing: bool = False
    # Tokens whose logits exist at one time in the loss.
    loss_chunk: Annotated[int, Field(gt=0)] = 1024
    # Added to the mean square in the norms of the residual stream.
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    # Standard deviation of initial weights; those that write to the residual stream have it over sqrt(2 * depth).
    initializer_range: Annotated[float, Field(gt=0)] = 0.02

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return max(8, round(self.mlp_ratio * self.width / 8) * 8)


class SwiGLU(nn.Module):
    """`W3 (silu(W1 x) * W2 x)` (Shazeer 2020, arXiv 2002.05202); W1 and W2 are one matrix.

    `spike_rate`: where it is not 0, what enters both matrices is turned into spike counts first (see `Spikes`).
    """

    def __init__(self, width: int, hidden: int, *, spike_rate: float = 0.0):
        super().__init__()
        self.enter = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.leave = Spikes(spike_rate) if spike_rate else nn.Identity()
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.enter(x)).chunk(2, -1)
        return self.out(self.leave(F.silu(gate) * value))


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    With a `group` the mixer runs on groups of so many tokens, counted from the document's start, which know nothing of
    each other (the linear group RNN of LION, arXiv 2407.18232); 0: on the whole sequence.
    """

    def __init__(self, mixer: Mixer, hidden: int, norm_eps: float, *, group: int = 0, spike_rate: float = 0.0):
        super().__init__()
        width = mixer.shape.width
        self.width, self.hidden, self.group = width, hidden, group
        self.mixer_norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = SwiGLU(width, hidden, spike_rate=spike_rate)

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        """`x: [B,T,D]`, or `[B,D]` for one token per row, and the layer's state -> the same after the block."""
        mixed, state = self._mix(self.mixer_norm(x), state, sequence)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def _mix(self, x: Tensor, state: State | None, sequence: SequenceContext) -> tuple[Tensor, State]:
        mix = self.mixer if x.dim() == 3 else self.mixer.step
        if not self.group:
            return mix(x, state, sequence=sequence)
        # The mixer's state is that of the unfinished group; the tokens seen, int64 `[B]`, say how far it is.
        past = dict(state or {})
        seen = past.pop("seen", None)
        _, after = sequence.count(seen, x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.device)
        mixed, state = mix(x, past or None, sequence=sequence.grouped(self.group, seen))
        return mixed, state | {"seen": after}

    def flops(self, tokens: int) -> int:
        """Forward pass over one sequence: the mixer's, and `6 T D hidden` of the MLP."""
        whole, rest = divmod(tokens, self.group) if self.group else (0, tokens)
        mixers = whole * self.mixer.flops(self.group) + self.mixer.flops(rest)
        return mixers + 6 * tokens * self.width * self.hidden

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens; in groups, of the longest unfinished group."""
        return self.mixer.state_bytes(self.group - 1) + 8 if self.group else self.mixer.state_bytes(tokens)


class Head(nn.Module):
    """The matrix `[vocab, D]` that scores next tokens. Tied, it holds the embedding's own parameter.

    A parameter that two modules hold is gathered for both by ZeRO-3, which an access from outside would not be.
    """

    def __init__(self, weight: Tensor, chunk: int):
        super().__init__()
        self.weight = weight
        self.chunk = chunk

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """`[...,D]` -> float32 logits `[...,vocab]`, or the loss summed over labels that are not -100."""
        if labels is not None:
            return linear_cross_entropy(hidden.flatten(0, -2), self.weight, labels.flatten(), chunk=self.chunk)
        return F.linear(hidden, self.weight).to(torch.promote_types(hidden.dtype, torch.float32))


class LanguageModel(nn.Module):
    """A causal language model of any mixers. Weight decay belongs on parameters of two dimensions or more."""

    def __init__(
        self,
        config: ModelConfig,
        mixers: Mapping[str, Any],
        vocab_size: int,
        *,
        generator: torch.Generator | None = None,
    ):
        """`mixers`: the `Config` of mixers in `config.layers`, by name; those left out have their defaults.

        The initial weights follow from `torch.manual_seed`, or from `generator`, which is on the parameters' device.
        Raises `ConfigError`.
        """
        super().__init__()
        validate(ModelConfig, asdict(config), prefix="model.")
        self.config = config
        self.vocab_size = vocab_size
        if config.width % config.heads:
            raise ConfigError(f"model.width={config.width}: must be divisible by model.heads={config.heads}")
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.blocks: Any = nn.ModuleList(
            Block(
                _build_mixer(config, mixers, index),
                config.hidden,
                config.norm_eps,
                group=config.groups[index % len(config.groups)],
                spike_rate=config.spike_rate,
            )
            for index in range(config.depth)
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        tied = config.tie_embeddings
        weight = self.embedding.weight if tied else nn.Parameter(torch.empty(vocab_size, config.width))
        self.head = Head(weight, config.loss_chunk)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal matrices, zero biases, then what each mixer sets by its own rule, then the residual scaling."""
        deviation = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, ShortConvolution):
                module.reset_parameters(generator)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=deviation, generator=generator)
        for module in self.modules():
            if isinstance(module, Mixer):
                module.reset_parameters(generator)
            if isinstance(module, Mixer | SwiGLU):
                # So many sums of independent terms keep the residual stream at the size of one (GPT-2).
                module.out.weight.div_((2 * self.config.depth) ** 0.5)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        state: list[State] | None = None,
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
        state: list[State] | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        keep_state: bool = True,
        watch: Callable[[Tensor], None] = lambda x: None,
    ) -> tuple[Tensor, list[State]]:
        """What the head is given for `tokens: int64 [B,T]` or `[B]`: `[B,T,D]` or `[B,D]`, and the state after them.

        `tokens` may be their embeddings, too: floating, `[B,T,D]`. `watch` is shown what enters every block.
        """
        past: Iterable[State | None] = [None] * len(self.blocks) if state is None else state
        x, after = tokens if tokens.is_floating_point() else self.embedding(tokens), []  # B T D
        for block, before in zip(self.blocks, past, strict=True):
            watch(x)
            x, new = self._run(block, x, before, sequence)
            # Training drops states at once: those of full attention are as long as the sequence.
            if keep_state:
                after.append(new)
        return self.norm(x), after

    def step(
        self, tokens: Tensor, state: list[State], *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, list[State]]:
        """One token for each row: `tokens: int64 [B]` -> `([B,vocab], state)`."""
        return self(tokens, state=state, sequence=sequence)

    def _run(self, block: nn.Module, x: Tensor, state: State | None, sequence: SequenceContext) -> tuple[Tensor, State]:
        if not (self.config.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, state, sequence=sequence)
        contexts: dict[str, Any] = {"context_fn": checkpoint_contexts} if sequence.sends else {}
        # Nothing in a block draws random numbers, so their state needs no saving.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **contexts}
        return checkpoint(block, x, state, sequence=sequence, **options)

    def parameter_count(self) -> int:
        """Numbers that are learned, those that two modules share counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, tokens: int) -> int:
        """Forward pass with loss over one sequence: every block's, and `2 T D vocab` of the head."""
        return sum(block.flops(tokens) for block in self.blocks) + 2 * tokens * self.config.width * self.vocab_size

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens, in float32: the same for any number where mixers recur."""
        return sum(block.state_bytes(tokens) for block in self.blocks)


def default_config(mixer: str) -> Any:
    """The `Config` of the mixer of that name, all fields as they are by default. Raises `ConfigError`."""
    cls = MIXERS.get(mixer)
    try:
        return cls.Config()
    except TypeError as error:
        raise ConfigError(f"mixer.{mixer}: has no defaults ({error}); write conf/mixer/{mixer}.yaml") from error


def _build_mixer(config: ModelConfig, mixers: Mapping[str, Any], index: int) -> Mixer:
    name = config.layers[index % len(config.layers)]
    cls = MIXERS.get(name)
    mixer = cls(
        mixers[name] if name in mixers else default_config(name),
        LayerShape(config.width, config.heads, index, config.depth),
    )
    if mixer.grouped and (size := config.groups[index % len(config.groups)]):
        raise ConfigError(
            f"model.groups={list(config.groups)}: layer {index}, {name}, has groups of its own and can't have "
            f"these of {size} tokens: put 0 in that place, or another layer"
        )
    if not mixer.causal:
        raise ConfigError(f"model.layers={name}: sees tokens to come, which a language model must not, as configured")
    return mixer
