"""What every mixer is: a map of `[B, T, D]` to itself with a state that carries all it knows of the past."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, dataclass_transform

from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.initialization import Initializer
from seqtrain.mixers.common.counting import Counts, Kind, count
from seqtrain.mixers.common.recurrence import Past, Recurrence
from seqtrain.mixers.common.take_over import Projections
from seqtrain.parallel.sequence import SequenceContext, State
from seqtrain.parallel.tensor import ALONE, RowLinear, TensorParallel

WHOLE = SequenceContext()


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer and its position in the stack: model width D, heads H, index from 0, number of layers.

    `out`: channels of what leaves it, where a shared block has it; 0: as many as enter. `tensor`: the ranks over which
    heads are divided; those of `heads` are this rank's. `encoder`: its tokens see those after them, too.
    """

    width: int
    heads: int
    index: int = 0
    depth: int = 1
    out: int = 0
    tensor: TensorParallel = ALONE
    encoder: bool = False

    @property
    def all_heads(self) -> int:
        """Heads of all ranks."""
        return self.heads * self.tensor.count

    @property
    def channels(self) -> int:
        """This rank's of as many channels as the model has."""
        return self.share(self.width, f"model.width={self.width}")

    def share(self, number: int, key: str) -> int:
        """This rank's part of so many heads or channels. Raises `ConfigError`, which begins with `key`."""
        return even_share(number, self.tensor, key)

    def with_heads(self, heads: int) -> "LayerShape":
        """The same of so many heads of all ranks. Raises `ConfigError`."""
        return replace(self, heads=self.share(heads, f"model.heads={heads}"))


def even_share(number: int, tensor: TensorParallel, key: str) -> int:
    """This rank's part of so many. Raises `ConfigError`, which begins with `key`, where parts would be unequal."""
    if number % tensor.count:
        fitting = math.gcd(number, tensor.count)
        raise ConfigError(f"{key}: can't be divided by parallel.tensor={tensor.count}; use parallel.tensor={fitting}")
    return number // tensor.count


@dataclass_transform(frozen_default=True)
class MixerConfig:
    """Base of every mixer's `Config`: a class with it is a frozen dataclass."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)


class Mixer(nn.Module):
    """Base of the token mixers. A subclass lives in a file named after it, with a `Config` inside.

    State in, state out: a whole sequence, a piece of one and a single token are the same call. A subclass defines
    `mix`, and calls operators through `sequence.run` only: parameters, FLOPs and states are counted from that. The
    projection into the residual stream is the `nn.Linear` named `out`: the model scales its initial weights by depth.
    Weight decay falls on parameters of two dimensions or more, so biases, norms, decays and step sizes are kept
    one-dimensional.
    """

    Config: ClassVar[type]
    # What a conversion puts in attention's place under this mixer's name; None: nothing.
    recurrence: ClassVar[type[Recurrence] | None] = None
    # False where tokens see those after them: such a layer has no state, and no place in a language model.
    causal: bool = True
    # True where it cuts the sequence into groups itself, so that `model.groups` can't.
    grouped: bool = False
    out: nn.Linear

    def __init__(self, config: Any, shape: LayerShape):
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """`x: [B,T,D]` -> `([B,T,D], state)`; `state` None is an empty past. With documents, states are `[N,...]`.

        `stream: [B,T,D]`: what the output is added to, of which x is the norm; None: x itself.
        """
        x, stream = self.shape.tensor.enter(x), x if stream is None else stream
        return self.mix_into(self.shape.tensor.enter(stream), x, state or {}, sequence)

    def mix_into(self, stream: Tensor, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        """`mix` for mixers whose output takes the place of a part of the stream, where others only add to it."""
        return self.mix(x, past, sequence)

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        """`forward` as a subclass defines it; `past` is empty before the first token, and stays as it is."""
        raise NotImplementedError

    def step(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """One token for each row: `x: [B,D]` -> `([B,D], state)`; `stream`, too, is `[B,D]`."""
        # Called as a module, so that hooks run: ZeRO-3 gathers the weights in one.
        out, state = self(x[:, None], state, sequence=sequence, stream=None if stream is None else stream[:, None])
        return out[:, 0], state

    def projections(self) -> Projections:
        """The rows of its matrices that stand for attention's q, k, v and out, by these names; empty where none do."""
        return {}

    def init_from_attention(self, attention: Any) -> None:
        """Begins, in the place of a layer of softmax attention, with its projections. Raises `ConfigError`."""
        raise ConfigError(f"{type(self).__name__}: can't begin as softmax attention")

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, tokens: int) -> int:
        """Floating-point operations (a multiply-add is two) of the forward pass over one sequence of `tokens`.

        Those of the matrix products and of the operators, which count their recurrence whatever form a backend
        computes. Norms, gates and activations, below 2%, are not counted.
        """
        return self._counts(1, tokens).flops

    def state(self, tokens: int) -> Mapping[str, Tensor]:
        """One row's state after `tokens` tokens in float32, on the meta device, where it has shapes and no numbers."""
        return self._counts(1, tokens).state

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of `batch` rows after `tokens` tokens."""
        return {name: tuple(state.shape) for name, state in self._counts(batch, tokens).state.items()}

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens, in float32 where it is neither complex nor a count."""
        return sum(state.nbytes for state in self.state(tokens).values())

    @property
    def constant_state(self) -> bool:
        """False where the state grows with the tokens seen (softmax attention over everything)."""
        return self.state_shapes(1, 1) == self.state_shapes(1, 2)

    def _counts(self, batch: int, tokens: int) -> Counts:
        shapes = tuple(tuple(parameter.shape) for parameter in self.parameters())
        shape = replace(self.shape, tensor=replace(self.shape.tensor, group=None))
        sizes = self.shape.width, self.shape.heads, int(self.grouped), int(self.shape.encoder)
        kind = Kind(type(self), self.config, sizes, shapes, shape)
        return count(kind, batch, tokens)

    def initializers(self) -> dict[Tensor, Initializer]:
        """How parameters begin that the model's own rule (normal matrices, zero biases) does not fit, as decays.

        One that has any calls `seqtrain.initialization.initialize(self)` at the end of its constructor.
        """
        return {}

    def part_of_width(self, ratio: float = 1.0, field: str = "") -> int:
        """`width * ratio / heads`, the width of one head. Raises `ConfigError` where it is not a whole number.

        `field`: the config field that holds `ratio`, for the message.
        """
        width, heads = self.shape.width, self.shape.all_heads
        part = width * ratio / heads
        if part >= 1 and part == int(part):
            return int(part)
        if ratio == 1.0 or width % heads:
            raise ConfigError(f"model.width={width}: must be divisible by model.heads={heads}")
        raise self.config_error(field, ratio, f"times model.width={width} must be divisible by model.heads={heads}")

    def even_part_of_width(self) -> int:
        """`width / heads` where positions rotate pairs of channels by `rope_base`. Raises `ConfigError`."""
        part = self.part_of_width()
        if part % 2:
            raise self.config_error("rope_base", self.config.rope_base, f"needs an even head width, not {part}")
        return part

    def hidden_channels(self, expand: float) -> int:
        """This rank's of `width * expand`, rounded down. Raises `ConfigError` where that leaves none."""
        hidden = int(expand * self.shape.width)
        if not hidden:
            raise self.config_error("expand", expand, f"leaves no channel of model.width={self.shape.width}")
        return self.shape.share(hidden, f"{hidden} channels of {type(self).__name__}")

    def output(self, inner: int, **options: Any) -> RowLinear:
        """The projection into the residual stream, of this rank's `inner` channels. `options`: of `RowLinear`."""
        return RowLinear(inner, self.shape.out or self.shape.width, self.shape.tensor, **options)

    def config_error(self, field: str, value: Any, rule: str) -> ConfigError:
        """The error for this mixer's config field: `mixer.gla.expand_key=0.3: <rule>`."""
        return ConfigError(f"mixer.{type(self).__module__.rpartition('.')[2]}.{field}={value}: {rule}")
