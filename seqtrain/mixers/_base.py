"""What every mixer is: a map of `[B, T, D]` to itself with a state that carries all it knows of the past."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.parallel.sequence import SequenceContext

State = dict[str, Tensor]
WHOLE = SequenceContext()
EMPTY: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class LayerShape:
    """Where a layer stands: model width D, heads H, its index from 0, and the number of layers."""

    width: int
    heads: int
    index: int = 0
    depth: int = 1


class Mixer(nn.Module):
    """Base of the token mixers. A subclass lives in a file named after it, with a frozen dataclass `Config` inside.

    State in, state out: a whole sequence, a piece of one and a single token are the same call. Operators are called
    through `sequence.run` only. The projection into the residual stream is the `nn.Linear` named `out`: the model
    scales its initial weights by depth. Weight decay falls on parameters of two dimensions or more, so biases, norms,
    decays and step sizes are kept one-dimensional.
    """

    Config: ClassVar[type]
    # False where the state grows with the tokens seen (softmax attention over everything).
    constant_state: bool = True
    # False where the state after some tokens is neither an affine function of the state before them nor a list of past
    # inputs: ranks that share a sequence then hand it on, one after the other.
    affine: ClassVar[bool] = True
    # The dtype of state tensors that are not float32, by name.
    state_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}
    # False where tokens see those after them: such a layer has no state, and no place in a language model.
    causal: bool = True
    out: nn.Linear

    def __init__(self, config: Any, shape: LayerShape):
        super().__init__()
        self.config = config
        self.shape = shape

    def forward(
        self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE
    ) -> tuple[Tensor, State]:
        """`x: [B,T,D]` -> `([B,T,D], state)`; `state` None is an empty past. With documents, states are `[N,...]`."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State | None = None, *, sequence: SequenceContext = WHOLE) -> tuple[Tensor, State]:
        """One token for each row: `x: [B,D]` -> `([B,D], state)`."""
        # Called as a module, so that hooks run: ZeRO-3 gathers the weights in one.
        out, state = self(x[:, None], state, sequence=sequence)
        return out[:, 0], state

    def state_shapes(self, batch: int, tokens: int = 1) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of `batch` rows after `tokens` tokens: the same for any number if `constant_state`."""
        raise NotImplementedError

    def weights(self) -> tuple[int, int]:
        """Numbers of parameters, from the config alone: those of matrices that multiply every token, and all others."""
        raise NotImplementedError

    def operator_flops(self, tokens: int) -> int:
        """Multiply-adds times two of the operators over one sequence of `tokens`, as `_costs.py` counts them."""
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Number of parameters, from the config alone."""
        return sum(self.weights())

    def flops(self, tokens: int) -> int:
        """Floating-point operations (a multiply-add is two) of the forward pass over one sequence of `tokens`.

        `2 * tokens * weights of the matrices + operators`. Norms, gates and activations, below 2%, are not counted.
        """
        return 2 * tokens * self.weights()[0] + self.operator_flops(tokens)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after `tokens` tokens, in float32 where `state_dtypes` says nothing else."""
        shapes = self.state_shapes(1, tokens)
        return sum(
            torch.Size(shape).numel() * self.state_dtypes.get(name, torch.float32).itemsize
            for name, shape in shapes.items()
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises what the model's own rule (normal weights, zero biases, unit norms) does not fit, as decays."""

    def part_of_width(self, ratio: float = 1.0, field: str = "") -> int:
        """`width * ratio / heads`, the width of one head. Raises `ConfigError` where it is not a whole number.

        `field`: the config field that holds `ratio`, for the message.
        """
        width, heads = self.shape.width, self.shape.heads
        part = width * ratio / heads
        if part >= 1 and part == int(part):
            return int(part)
        if ratio == 1.0:
            raise ConfigError(f"model.width={width}: must be divisible by model.heads={heads}")
        raise self.config_error(field, ratio, f"times model.width={width} must be divisible by model.heads={heads}")

    def config_error(self, field: str, value: Any, rule: str) -> ConfigError:
        """The error for this mixer's config field: `mixer.gla.expand_key=0.3: <rule>`."""
        return ConfigError(f"mixer.{type(self).__module__.rpartition('.')[2]}.{field}={value}: {rule}")
