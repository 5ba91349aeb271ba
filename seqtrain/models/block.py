"""A layer: a mixer over time, then an MLP or experts over channels, each with its norm and added to the stream."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.mixers import WHOLE, LayerShape, Mixer, State
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.models.config import ModelConfig, Norms, default_config, mixer_class
from seqtrain.models.feed_forward import MLP, MoE
from seqtrain.models.shared import PREFIX, SharedBlock
from seqtrain.models.spark import spark_mlp
from seqtrain.models.spiking import spike_inputs
from seqtrain.parallel.recompute import Keep, recomputed
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.tensor import TensorParallel


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + feed_forward(norm(x))`; either may be missing.

    `norms`: where it normalises: what enters a part (pre), what leaves it (post), both, or the stream that a part reads
    and is added to (stream: DeepNorm, arXiv 2203.00555). `scales`: see `ModelConfig.sum_scales`. With a `group` the
    mixer runs on groups of so many tokens, counted from the document's start, which know nothing of each other (the
    linear group RNN of LION, arXiv 2407.18232), from `shift` tokens before it; 0: on the whole sequence.
    `shared`: what adds to
    what the mixer is given. `again`: parts that are computed again in the backward pass, see `ModelConfig.recompute`;
    `inputs`: the type in which what enters them is kept.
    """

    def __init__(
        self,
        mixer: Mixer | None,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        *,
        norms: Norms = "pre",
        group: int = 0,
        shift: int = 0,
        scales: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        shared: SharedBlock | None = None,
        again: frozenset[str] = frozenset(),
        inputs: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.inputs = inputs
        self.group, self.shift, self.norms, self.scales, self.again = group, shift, norms, scales, again

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
        keep_state: bool = True,
    ) -> tuple[Tensor, State]:
        """`x: [B,T,D]`, or `[B,D]` for one token per row, and the layer's state -> the same after the block.

        `first`: what entered the first block, for a shared one; None: x. `keep_state`: False gives no state, so that it
        takes no memory while the second part runs.
        """
        x, state = self.mix(x, state, sequence, first)
        state = state if keep_state else {}
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
        entered = self.mixer_norm(given) if self.norms == "stream" else given
        last = self._last(self.mixer_post_norm, self.mixer.out)
        mixed, state = self._part(self._mix_part, "projection", sequence.sends, last, entered, state, sequence)
        return self._sum(x, entered, mixed, *self.scales[:2]), state | kept

    def feed(self, x: Tensor) -> Tensor:
        """The second part of `forward`: over channels."""
        if self.mlp is None:
            return x
        entered = self.mlp_norm(x) if self.norms == "stream" else x
        last = self._last(self.mlp_post_norm, self.mlp.out if isinstance(self.mlp, MLP) else None)
        fed = self._part(self._feed_part, "mlp", self.mlp.sends, last, entered)
        return self._sum(x, entered, fed, *self.scales[2:])

    def _part(
        self, function: Callable[..., Any], name: str, sends: bool, last: nn.Module | None, *arguments: Any
    ) -> Any:
        """`function(*arguments)`, computed again in the backward pass where `again` has its name, or norms."""
        if not torch.is_grad_enabled() or self.again.isdisjoint((name, "norm")):
            return function(*arguments)
        whole: Keep = "operators" if name == "projection" else "sent"
        return recomputed(
            function,
            *arguments,
            keep=whole if name in self.again else "products",
            sends=sends,
            last=last,
            inputs=self.inputs,
        )

    def _mix_part(self, x: Tensor, state: State | None, sequence: SequenceContext) -> tuple[Tensor, State]:
        mixed, state = self._mixed(x if self.norms == "stream" else self.mixer_norm(x), state, sequence, x)
        return self.mixer_post_norm(mixed), state

    def _feed_part(self, x: Tensor) -> Tensor:
        fed: Tensor = self.mlp_post_norm(self.mlp(x if self.norms == "stream" else self.mlp_norm(x)))
        return fed

    def _last(self, norm: nn.Module, out: nn.Module | None) -> nn.Module | None:
        """What writes to the residual stream: nothing needs its result but a norm."""
        return out if isinstance(out, nn.Linear) and isinstance(norm, nn.Identity) else None

    def _sum(self, x: Tensor, entered: Tensor, y: Tensor, kept: float, added: float) -> Tensor:
        stream = entered if self.norms == "stream" else x
        return (stream if kept == 1 else kept * stream) + (y if added == 1 else added * y)

    def _mixed(self, x: Tensor, state: State | None, sequence: SequenceContext, stream: Tensor) -> tuple[Tensor, State]:
        assert self.mixer is not None
        mix: Callable[..., tuple[Tensor, State]] = partial(
            self.mixer if x.dim() == 3 else self.mixer.step, stream=stream
        )
        if not self.group:
            return mix(x, state, sequence=sequence)
        # The mixer's state is that of the unfinished group; the tokens seen, int64 `[B]`, say how far it is.
        past = dict(state or {})
        seen = past.pop("seen", None)
        _, after = sequence.count(seen, x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.device)
        mixed, state = mix(x, past or None, sequence=sequence.grouped(self.group, seen, self.shift))
        return mixed, state | {"seen": after}

    def mixer_flops(self, tokens: int) -> int:
        """Forward pass of the mixer over one sequence."""
        if self.mixer is None:
            return 0
        shared = 0 if self.shared is None else self.shared.flops(tokens)
        if not self.group:
            return self.mixer.flops(tokens) + shared
        first = min(tokens, self.group - self.shift) if self.shift else 0
        whole, rest = divmod(tokens - first, self.group)
        return self.mixer.flops(first) + whole * self.mixer.flops(self.group) + self.mixer.flops(rest) + shared

    def mlp_flops(self, tokens: int) -> int:
        """Forward pass of what works on channels."""
        return 0 if self.mlp is None else self.mlp.flops(tokens)

    def state(self, tokens: int) -> State:
        """One row's state after `tokens` tokens, see `Mixer.state`; in groups, of the longest unfinished group."""
        if self.mixer is None:
            return {}
        found = dict(self.mixer.state(self.group - 1 if self.group else tokens))
        if self.group:
            found["seen"] = torch.empty(1, dtype=torch.int64, device="meta")
        if self.shared is not None:
            found |= {PREFIX + name: each for name, each in self.shared.attention.state(tokens).items()}
        return found

    def state_bytes(self, tokens: int) -> int:
        """Bytes of that."""
        return sum(each.nbytes for each in self.state(tokens).values())


def build_blocks(
    config: ModelConfig, mixers: Mapping[str, Any], norm: Callable[[int], nn.Module], tensor: TensorParallel
) -> Iterator[Block]:
    """The blocks of `config`, in their order. `mixers`, `tensor`: see `LanguageModel`; `norm`: of so many channels.

    Raises `ConfigError`.
    """
    shared = _shared(config, mixers, norm, tensor)
    for index in range(config.depth):
        block = Block(
            _mixer(config, mixers, index, tensor),
            _feed_forward(config, index, tensor),
            partial(norm, config.width),
            norms=config.norms[index % len(config.norms)],
            group=config.groups[index % len(config.groups)],
            shift=_shift(config, index),
            scales=config.scales(index),
            shared=shared.get(index),
            again=config.recomputed,
            inputs=getattr(torch, config.recompute_inputs),
        )
        if config.spike_rate:
            spike_inputs(block, config.spike_rate)
        yield block


def _shift(config: ModelConfig, index: int) -> int:
    """By how many tokens layer `index`'s groups are shifted. Raises `ConfigError`."""
    size, shift = (each[index % len(each)] for each in (config.groups, config.group_shift))
    if shift and shift >= size:
        raise ConfigError(f"model.group_shift={list(config.group_shift)}: layer {index} has groups of {size} tokens")
    return shift


def _mixer(config: ModelConfig, mixers: Mapping[str, Any], index: int, tensor: TensorParallel) -> Mixer | None:
    name = config.mixer(index)
    if name == "none":
        return None
    own = mixers[name] if name in mixers else default_config(name)
    heads = getattr(own, "heads", 0) or config.heads
    encoder = config.kind == "encoder"
    shape = LayerShape(config.width, 0, index, config.depth, tensor=tensor, encoder=encoder).with_heads(heads)
    mixer = mixer_class(name)(own, shape)
    if mixer.grouped and (size := config.groups[index % len(config.groups)]):
        raise ConfigError(
            f"model.groups={list(config.groups)}: layer {index}, {name}, has groups of its own and can't have "
            f"these of {size} tokens: put 0 in that place, or another layer"
        )
    if encoder and (mixer.grouped or any(config.groups)):
        raise ConfigError(f"model.kind=encoder: layer {index}, {name}, has groups of tokens, which encoders can't have")
    if not encoder and not mixer.causal:
        rule = "sees tokens to come, which a language model must not, as configured; use model.kind=encoder"
        raise ConfigError(f"model.layers={name}: {rule}")
    return mixer


def _shared(
    config: ModelConfig, mixers: Mapping[str, Any], norm: Callable[[int], nn.Module], tensor: TensorParallel
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
        shape = LayerShape(2 * config.width, 0, index, config.depth, out=config.width, tensor=tensor)
        mixer = mixer_class(shared.mixer)(own, shape.with_heads(config.heads))
        found[index] = SharedBlock(mixer, _mlp(config, tensor, adapter_rank=shared.adapter_rank), norm, config.width)
        if number in made:
            found[index].hold(made[number])
        made.setdefault(number, found[index])
    return found


def _mlp(config: ModelConfig, tensor: TensorParallel, **options: Any) -> MLP:
    shape: dict[str, Any] = {"activation": config.activation, "gated": config.mlp_gated, "bias": config.mlp_bias}
    shape |= {"gate_scale": config.mlp_gate_scale, "out_scale": config.mlp_out_scale}
    shape |= {"epilogue": config.mlp_epilogue}
    return MLP(config.width, config.hidden, tensor=tensor, **shape, **options)


def _feed_forward(config: ModelConfig, index: int, tensor: TensorParallel) -> nn.Module | None:
    kind = config.mlp(index)
    if kind == "none":
        return None
    if kind == "mlp":
        return _mlp(config, tensor)
    if kind == "spark":
        return spark_mlp(config, tensor)
    if not config.experts:
        raise ConfigError(f"model.mlps={list(config.mlps)}: a layer has routed experts; say how many: model.experts=")
    return MoE(
        config.width,
        config.expert_width or config.hidden,
        experts=config.experts,
        chosen=config.experts_per_token,
        router=config.router,
        shared=config.shared_expert_width,
        tensor=tensor,
        latent=config.expert_latent,
        activation=config.activation,
        gated=config.mlp_gated,
        spike_rate=config.spike_rate,
    )
