"""The network: embedding, blocks of the pattern `layers`, a norm, and a head that never holds all logits.

A block is a mixer over time, then an MLP over channels, each normalised before and added after.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqtrain.errors import ConfigError
from seqtrain.kernels.linear_cross_entropy import linear_cross_entropy, soft_cap
from seqtrain.layers import RMSNorm, ShortConvolution
from seqtrain.mixers import MIXERS, WHOLE, LayerShape, Mixer, State
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models.feed_forward import MLP, Activation, MoE, RouterConfig
from seqtrain.models.shared import PREFIX, SharedBlock, SharedConfig
from seqtrain.parallel.scan import checkpoint_contexts
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.validation import validate

Norms = Literal["pre", "post", "both", "stream"]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ModelConfig:
    """The keys under `model.`; the files in `conf/model/` hold one ready choice each."""

    # Rows of embedding and head, at least as many as the tokenizer has ids; 0: as many.
    vocab_size: Annotated[int, Field(ge=0)] = 0
    # Names of mixers (files in seqtrain/mixers/), repeated over the depth; none: a layer without one.
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
    # Hidden channels of the MLP; 0: as mlp_ratio says.
    mlp_width: Annotated[int, Field(ge=0)] = 0
    # What follows the mixer of each layer, repeated over the depth: an MLP, routed experts (moe), or nothing (none).
    mlps: Annotated[tuple[Literal["mlp", "moe", "none"], ...], Field(min_length=1)] = ("mlp",)
    # What MLPs and experts apply to their hidden channels; relu2 is the square of relu.
    activation: Activation = "silu"
    # True: it is applied to one half, which multiplies the other (SwiGLU); False: to all.
    mlp_gated: bool = True
    # True: matrices of the MLP have biases.
    mlp_bias: bool = False
    # Factor on what an MLP applies its activation to.
    mlp_gate_scale: Annotated[float, Field(gt=0)] = 1.0
    # Factor on what leaves an MLP.
    mlp_out_scale: Annotated[float, Field(gt=0)] = 1.0
    # Routed experts in a mixture-of-experts layer; 0: none. All layers have them unless mlps says which.
    experts: Annotated[int, Field(ge=0)] = 0
    # Experts that work on each token.
    experts_per_token: Annotated[int, Field(gt=0)] = 2
    # Hidden channels of an expert; 0: of the MLP.
    expert_width: Annotated[int, Field(ge=0)] = 0
    # Hidden channels of the expert that works on every token; 0: none.
    shared_expert_width: Annotated[int, Field(ge=0)] = 0
    # Channels that experts work on, by a projection before and after them; 0: of the residual stream.
    expert_latent: Annotated[int, Field(ge=0)] = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    # Mean spikes per value where the MLP computes on spike counts (SpikingBrain); 0: no spikes, plain activations.
    spike_rate: Annotated[float, Field(ge=0)] = 0.0
    shared: SharedConfig = field(default_factory=SharedConfig)
    # True: the head uses the embedding's matrix, which saves vocab * width parameters.
    tie_embeddings: bool = True
    # True: a block's activations are computed again in the backward pass instead of kept.
    activation_checkpointing: bool = False
    # Tokens whose logits exist at one time in the loss.
    loss_chunk: Annotated[int, Field(gt=0)] = 1024
    # Where each layer normalises, repeated over the depth: what enters mixer and MLP (pre), what leaves them (post), or
    # the residual stream itself before each of them (stream).
    norms: Annotated[tuple[Norms, ...], Field(min_length=1)] = ("pre",)
    # Added to the mean square in the norms of the residual stream.
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    # True: these norms multiply by 1 + weight (Gemma).
    norm_zero_centered: bool = False
    # Factors on embeddings, on what each mixer and MLP adds, and on logits.
    embedding_scale: Annotated[float, Field(gt=0)] = 1.0
    residual_scale: Annotated[float, Field(gt=0)] = 1.0
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    # Factors of each layer's sums, repeated over the depth: on the stream and on what the mixer adds, on the stream and
    # on what the MLP adds (alpha and beta of DeepNorm).
    sum_scales: Annotated[tuple[tuple[Positive, Positive, Positive, Positive], ...], Field(min_length=1)] = (
        (1.0, 1.0, 1.0, 1.0),
    )
    # What logits stay below in size, softly (Gemma 2); 0: unbounded.
    logit_cap: Annotated[float, Field(ge=0)] = 0.0
    # Standard deviation of initial weights; those that write to the residual stream have it over sqrt(2 * depth).
    initializer_range: Annotated[float, Field(gt=0)] = 0.02

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return self.mlp_width or max(8, round(self.mlp_ratio * self.width / 8) * 8)

    def mixer(self, index: int) -> str:
        """The name of layer `index`'s mixer."""
        return self.layers[index % len(self.layers)]

    @property
    def mixers(self) -> tuple[str, ...]:
        """The names of all mixers, in the order in which layers first have them."""
        shared = (self.shared.mixer,) if any(self.shared.layers) else ()
        return tuple(name for name in dict.fromkeys((*self.layers, *shared)) if name != "none")

    def mlp(self, index: int) -> str:
        """What follows it."""
        kinds = ("moe",) if self.experts and self.mlps == ("mlp",) else self.mlps
        return kinds[index % len(kinds)]

    def scales(self, index: int) -> tuple[float, float, float, float]:
        """The factors of its two sums: on stream and mixer, on stream and MLP."""
        stream, mixer, stream_again, mlp = self.sum_scales[index % len(self.sum_scales)]
        return stream, mixer * self.residual_scale, stream_again, mlp * self.residual_scale

    @property
    def period(self) -> int:
        """After so many layers they begin anew."""
        patterns = (self.layers, self.groups, self.mlps, self.norms, self.sum_scales, self.shared.layers)
        return math.lcm(*map(len, patterns))


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + feed_forward(norm(x))`; either may be missing.

    `norms`: where it normalises: what enters a part (pre), what leaves it (post), both, or the stream that a part reads
    and is added to (stream: DeepNorm, arXiv 2203.00555). `scales`: see `ModelConfig.sum_scales`. With a `group` the
    mixer runs on groups of so many tokens, counted from the document's start, which know nothing of each other (the
    linear group RNN of LION, arXiv 2407.18232); 0: on the whole sequence. `shared`: what adds to
    what the mixer is given.
    """

    def __init__(
        self,
        mixer: Mixer | None,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        *,
        norms: Norms = "pre",
        group: int = 0,
        scales: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        shared: SharedBlock | None = None,
    ):
        super().__init__()
        self.group, self.norms, self.scales = group, norms, scales

        def norm_at(place: Norms, part: nn.Module | None) -> nn.Module:
            places = {"both": ("pre", "post"), "stream": ("pre",)}.get(norms, (norms,))
            return norm() if part is not None and place in places else nn.Identity()

        self.shared = shared
        self.mixer_norm = norm_at("pre", mixer)
        self.mixer: Mixer | None = mixer
        self.mixer_post_norm = norm_at("post", mixer)
        self.mlp_norm = norm_at("pre", mlp)
        self.mlp: Any = mlp
        self.mlp_post_norm = norm_at("post", mlp)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        first: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """`x: [B,T,D]`, or `[B,D]` for one token per row, and the layer's state -> the same after the block.

        `first`: what entered the first block, for a shared one; None: x.
        """
        x, state = self.mix(x, state, sequence, first)
        return self.feed(x), state

    def mix(
        self,
        x: Tensor,
        state: State | None = None,
        sequence: SequenceContext = WHOLE,
        first: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The first part of `forward`: over time."""
        if self.mixer is None:
            return x, {}
        given, kept = x, {}
        if self.shared is not None:
            past = {name.removeprefix(PREFIX): each for name, each in (state or {}).items() if name.startswith(PREFIX)}
            added, after = self.shared(x, x if first is None else first, past, sequence)
            given, kept = x + added, {PREFIX + name: each for name, each in after.items()}
        entered = self.mixer_norm(given)
        mixed, state = self._mixed(entered, state, sequence)
        return self._sum(x, entered, self.mixer_post_norm(mixed), *self.scales[:2]), state | kept

    def feed(self, x: Tensor) -> Tensor:
        """The second part of `forward`: over channels."""
        if self.mlp is None:
            return x
        entered = self.mlp_norm(x)
        return self._sum(x, entered, self.mlp_post_norm(self.mlp(entered)), *self.scales[2:])

    def _sum(self, x: Tensor, entered: Tensor, y: Tensor, kept: float, added: float) -> Tensor:
        stream = entered if self.norms == "stream" else x
        return (stream if kept == 1 else kept * stream) + (y if added == 1 else added * y)

    def _mixed(self, x: Tensor, state: State | None, sequence: SequenceContext) -> tuple[Tensor, State]:
        assert self.mixer is not None
        mix: Callable[..., tuple[Tensor, State]] = self.mixer if x.dim() == 3 else self.mixer.step
        if not self.group:
            return mix(x, state, sequence=sequence)
        # The mixer's state is that of the unfinished group; the tokens seen, int64 `[B]`, say how far it is.
        past = dict(state or {})
        seen = past.pop("seen", None)
        _, after = sequence.count(seen, x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.device)
        mixed, state = mix(x, past or None, sequence=sequence.grouped(self.group, seen))
        return mixed, state | {"seen": after}

    def mixer_flops(self, tokens: int) -> int:
        """Forward pass of the mixer over one sequence."""
        if self.mixer is None:
            return 0
        whole, rest = divmod(tokens, self.group) if self.group else (0, tokens)
        shared = 0 if self.shared is None else self.shared.flops(tokens)
        return whole * self.mixer.flops(self.group) + self.mixer.flops(rest) + shared

    def mlp_flops(self, tokens: int) -> int:
        """Forward pass of what works on channels."""
        return 0 if self.mlp is None else self.mlp.flops(tokens)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens; in groups, of the longest unfinished group."""
        if self.mixer is None:
            return 0
        shared = 0 if self.shared is None else self.shared.attention.state_bytes(tokens)
        return shared + (self.mixer.state_bytes(self.group - 1) + 8 if self.group else self.mixer.state_bytes(tokens))


class Head(nn.Module):
    """The matrix `[vocab, D]` that scores next tokens. Tied, it holds the embedding's own parameter.

    A parameter that two modules hold is gathered for both by ZeRO-3, which an access from outside would not be.
    """

    def __init__(self, weight: Tensor, chunk: int, *, scale: float = 1.0, cap: float = 0.0):
        super().__init__()
        self.weight = weight
        self.chunk, self.scale, self.cap = chunk, scale, cap

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """`[...,D]` -> float32 logits `[...,vocab]`, or the loss summed over labels that are not -100."""
        hidden = hidden if self.scale == 1 else hidden * self.scale
        if labels is not None:
            rows = hidden.flatten(0, -2)
            return linear_cross_entropy(rows, self.weight, labels.flatten(), chunk=self.chunk, cap=self.cap)
        return soft_cap(F.linear(hidden, self.weight).to(torch.promote_types(hidden.dtype, torch.float32)), self.cap)


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
        if 0 < config.vocab_size < vocab_size:
            raise ConfigError(f"model.vocab_size={config.vocab_size}: the tokenizer has {vocab_size} ids")
        self.config = config
        self.vocab_size = vocab_size = config.vocab_size or vocab_size
        self.embedding = nn.Embedding(vocab_size, config.width)
        norms = partial(RMSNorm, eps=config.norm_eps, zero_centered=config.norm_zero_centered)
        norm, shared = partial(norms, config.width), _build_shared(config, mixers, norms)
        self.blocks: Any = nn.ModuleList(
            Block(
                _build_mixer(config, mixers, index),
                _build_mlp(config, index),
                norm,
                norms=config.norms[index % len(config.norms)],
                group=config.groups[index % len(config.groups)],
                scales=config.scales(index),
                shared=shared.get(index),
            )
            for index in range(config.depth)
        )
        self.norm = norm()
        tied = config.tie_embeddings
        weight = self.embedding.weight if tied else nn.Parameter(torch.empty(vocab_size, config.width))
        self.head = Head(weight, config.loss_chunk, scale=config.logit_scale, cap=config.logit_cap)
        # What `save_pretrained` needs of one that came from `from_pretrained`.
        self.origin: Any = None
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
            if isinstance(module, MoE):
                for weight in (module.up, module.down):
                    nn.init.normal_(weight, std=deviation, generator=generator)
        parts = [part for part in self.modules() if isinstance(part, Mixer | MLP | MoE) and part.out is not None]
        # What layers share is scaled once.
        for last in dict.fromkeys(part.last if isinstance(part, MoE) else part.out.weight for part in parts):
            # So many sums of independent terms keep the residual stream at the size of one (GPT-2).
            last.div_((2 * self.config.depth) ** 0.5)

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
        x = x if self.config.embedding_scale == 1 else x * self.config.embedding_scale
        first = x if any(block.shared is not None for block in self.blocks) else None
        for block, before in zip(self.blocks, past, strict=True):
            watch(x)
            x, new = self._run(block, x, before, sequence, first)
            # Training drops states at once: those of full attention are as long as the sequence.
            if keep_state:
                after.append(new)
        return self.norm(x), after

    def step(
        self, tokens: Tensor, state: list[State], *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, list[State]]:
        """One token for each row: `tokens: int64 [B]` -> `([B,vocab], state)`."""
        return self(tokens, state=state, sequence=sequence)

    def _run(
        self, block: Any, x: Tensor, state: State | None, sequence: SequenceContext, first: Tensor | None
    ) -> tuple[Tensor, State]:
        if not (self.config.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, state, sequence=sequence, first=first)
        sharded = isinstance(block.mlp, MoE) and block.mlp.group is not None
        contexts: dict[str, Any] = {"context_fn": checkpoint_contexts} if sequence.sends or sharded else {}
        # Nothing in a block draws random numbers, so their state needs no saving.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **contexts}
        return checkpoint(block, x, state, sequence=sequence, first=first, **options)

    def parameter_count(self) -> int:
        """Numbers that are learned, those that two modules share counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, tokens: int) -> int:
        """Forward pass with loss over one sequence: every block's, and `2 T D vocab` of the head."""
        blocks = sum(block.mixer_flops(tokens) + block.mlp_flops(tokens) for block in self.blocks)
        return blocks + 2 * tokens * self.config.width * self.vocab_size

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens, in float32: the same for any number where mixers recur."""
        return sum(block.state_bytes(tokens) for block in self.blocks)


def default_config(mixer: str) -> Any:
    """The `Config` of the mixer of that name, all fields as they are by default. Raises `ConfigError`."""
    cls = mixer_class(mixer)
    try:
        return cls.Config()
    except TypeError as error:
        raise ConfigError(f"mixer.{mixer}: has no defaults ({error}); write conf/mixer/{mixer}.yaml") from error


def mixer_class(name: str) -> type[Mixer]:
    """The mixer that layers called `name` have: what comes before a dot, as in `attention.local`. Raises `ConfigError`.

    So layers of one mixer can have configs of their own.
    """
    return MIXERS.get(name.partition(".")[0])


def _build_mixer(config: ModelConfig, mixers: Mapping[str, Any], index: int) -> Mixer | None:
    name = config.mixer(index)
    if name == "none":
        return None
    own = mixers[name] if name in mixers else default_config(name)
    heads = getattr(own, "heads", 0) or config.heads
    mixer = mixer_class(name)(own, LayerShape(config.width, heads, index, config.depth))
    if mixer.grouped and (size := config.groups[index % len(config.groups)]):
        raise ConfigError(
            f"model.groups={list(config.groups)}: layer {index}, {name}, has groups of its own and can't have "
            f"these of {size} tokens: put 0 in that place, or another layer"
        )
    if not mixer.causal:
        raise ConfigError(f"model.layers={name}: sees tokens to come, which a language model must not, as configured")
    return mixer


def _build_shared(
    config: ModelConfig, mixers: Mapping[str, Any], norm: Callable[[int], nn.Module]
) -> dict[int, SharedBlock]:
    """The shared block of each layer that has one."""
    shared = config.shared
    found: dict[int, SharedBlock] = {}
    made: dict[int, SharedBlock] = {}
    for index in range(config.depth):
        if not (number := shared.block(index)):
            continue
        own = mixers[shared.mixer] if shared.mixer in mixers else default_config(shared.mixer)
        if not isinstance(own, SoftmaxAttention.Config):
            raise ConfigError(f"model.shared.mixer={shared.mixer}: must be one of softmax attention")
        if config.mixer(index) == "none" or config.groups[index % len(config.groups)]:
            raise ConfigError(f"model.shared.layers={list(shared.layers)}: layer {index} needs a mixer, and no groups")
        shape = LayerShape(2 * config.width, config.heads, index, config.depth, out=config.width)
        mixer = mixer_class(shared.mixer)(own, shape)
        found[index] = SharedBlock(mixer, _mlp(config, adapter_rank=shared.adapter_rank), norm, config.width)
        if number in made:
            found[index].hold(made[number])
        made.setdefault(number, found[index])
    return found


def _mlp(config: ModelConfig, **options: Any) -> MLP:
    shape: dict[str, Any] = {"activation": config.activation, "gated": config.mlp_gated, "bias": config.mlp_bias}
    shape |= {"gate_scale": config.mlp_gate_scale, "out_scale": config.mlp_out_scale, "spike_rate": config.spike_rate}
    return MLP(config.width, config.hidden, **shape, **options)


def _build_mlp(config: ModelConfig, index: int) -> nn.Module | None:
    kind = config.mlp(index)
    if kind == "none":
        return None
    if kind == "mlp":
        return _mlp(config)
    if not config.experts:
        raise ConfigError(f"model.mlps={list(config.mlps)}: a layer has routed experts; say how many: model.experts=")
    return MoE(
        config.width,
        config.expert_width or config.hidden,
        experts=config.experts,
        chosen=config.experts_per_token,
        router=config.router,
        shared=config.shared_expert_width,
        latent=config.expert_latent,
        activation=config.activation,
        gated=config.mlp_gated,
    )
