"""States of generation in two to four bits a number, by TurboQuant: memories of recurrences, and keys and values.

Between steps a model's states are bytes; a step has one layer's as numbers at a time. Keys and values are rounded once.
A recurrence's memory would be rounded after every token, and errors of old roundings would stay in it: it is rounded
after every `round_every` tokens instead, and until then a step reads the tokens since then once more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.mixers import State
from seqtrain.models.turboquant import TurboQuant, parts_of
from seqtrain.parallel.sequence import SequenceContext

# What `state_bits` may be, and not 0.
STATE_BITS = (4, 3, 2)
# What a part of a state's name ends with where it is a memory. Others are small: a convolution's last tokens, counts.
MEMORIES = ("memory", "slot_keys", "slot_values")


@dataclass(frozen=True)
class GenerationConfig:
    """How states are kept while a prompt is continued."""

    # Bits of a number in recurrent memories and in keys and values, by TurboQuant; 0: as they are.
    state_bits: Literal[0, 2, 3, 4] = 0
    # With state_bits, tokens after which states are rounded. Each step reads those since the last rounding again: more
    # take time, and a memory has fewer errors.
    round_every: Annotated[int, Field(gt=0)] = 16


EXACT = GenerationConfig()


@dataclass(frozen=True)
class _Form:
    """How a part of a state is bytes: rows `[...,width]` of `dtype`, in parts that `quantizer` packs."""

    quantizer: TurboQuant
    width: int
    dtype: torch.dtype

    def pack(self, x: Tensor) -> Tensor:
        rows = torch.view_as_real(x).flatten(-2) if x.is_complex() else x
        return self.quantizer.pack(rows.unflatten(-1, (-1, self.quantizer.width))).flatten(-2)

    def unpack(self, packed: Tensor) -> Tensor:
        rows = self.quantizer.unpack(packed.unflatten(-1, (-1, self.quantizer.row_bytes))).flatten(-2)
        if not self.dtype.is_complex:
            return rows.to(self.dtype)
        return torch.view_as_complex(rows.unflatten(-1, (-1, 2)).to(self.dtype.to_real())).to(self.dtype)


# A layer's state, of which parts are bytes: those that have a form.
Packed = tuple[State, Mapping[str, _Form]]


class RoundedStates:
    """The states of a model's layers between steps; iterating gives each as numbers, None before the first token.

    A step makes others and leaves these as they are.
    """

    def __init__(self, layers: int, config: GenerationConfig):
        self.config = config
        self._layers: list[Packed | None] = [None] * layers
        # Tokens that are not in the layers' states yet, int64 `[B,n]`.
        self._since: Tensor | None = None
        self._before: RoundedStates | None = None
        self._tokens = 0

    @classmethod
    def of(cls, states: Sequence[State], config: GenerationConfig) -> "RoundedStates":
        """Those of `states`, one of each layer."""
        found = cls(len(states), config).following(0)
        for state in states:
            found.append(state)
        return found

    def __iter__(self) -> Iterator[State | None]:
        for layer in self._layers:
            yield None if layer is None else _unpacked(*layer)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        since = 0 if self._since is None else self._since.nbytes
        return since + sum(x.nbytes for layer in self._layers if layer is not None for x in layer[0].values())

    def following(self, tokens: int) -> "RoundedStates":
        """What the layers' states after so many tokens more are appended to."""
        found = RoundedStates(0, self.config)
        found._before, found._tokens = self, tokens
        return found

    def append(self, state: State) -> None:
        """The next layer's."""
        assert self._before is not None
        before = self._before._layers[len(self._layers)]
        forms = forms_of(state, self.config.state_bits)
        keys, packed = _keys(state), dict[str, Tensor]()
        for name, x in state.items():
            if name not in forms:
                packed[name] = x
            elif name in keys:
                packed[name] = self._with_rows(x, forms[name], None if before is None else before[0][name])
            else:
                packed[name] = forms[name].pack(x)
        self._layers.append((packed, forms))
        if len(self._layers) == len(self._before):
            # Those before are needed no longer.
            self._before = None

    def _with_rows(self, x: Tensor, form: _Form, before: Tensor | None) -> Tensor:
        """Keys or values `[B,S,G,K]`: those that are bytes already stay so."""
        if before is None or self._tokens >= x.shape[1]:
            return form.pack(x)
        rows = torch.cat([before, form.pack(x[:, x.shape[1] - self._tokens :])], 1)
        missing = x.shape[1] - rows.shape[1]
        if missing > 0:
            # A window that was not full; bytes of zeros are rows of zeros.
            return torch.cat([rows.new_zeros(rows.shape[0], missing, *rows.shape[2:]), rows], 1)
        return rows[:, -missing:].clone()

    def step(self, model: Any, token: Tensor, sequence: SequenceContext) -> tuple[Tensor, "RoundedStates"]:
        """`LanguageModel.step`: `token: int64 [B]` -> `([B,vocab], states)`."""
        tokens = token[:, None] if self._since is None else torch.cat([self._since, token[:, None]], 1)
        if tokens.shape[1] == self.config.round_every:
            logits, after = model(tokens, state=self, sequence=sequence)
            return logits, after
        hidden, _ = model.hidden(tokens, self, sequence=sequence, keep_state=False)
        return model.head(hidden[:, -1]), self._with(self._layers, tokens)

    def rows(self, index: Tensor) -> "RoundedStates":
        """Some of the rows of a batch."""
        layers = [layer and ({name: x[index] for name, x in layer[0].items()}, layer[1]) for layer in self._layers]
        return self._with(layers, None if self._since is None else self._since[index])

    def _with(self, layers: list[Packed | None], since: Tensor | None) -> "RoundedStates":
        found = RoundedStates(0, self.config)
        found._layers, found._since = layers, since
        return found


def forms_of(state: Mapping[str, Tensor], bits: int) -> dict[str, _Form]:
    """Of the parts of a layer's state that are rounded. The tensors need no memory."""
    if not bits:
        return {}
    keys, found = _keys(state), dict[str, _Form]()
    for name, x in state.items():
        if name in keys or name.endswith(MEMORIES):
            width = x.shape[-1] * (2 if x.is_complex() else 1)
            if part := parts_of(width):
                found[name] = _Form(_quantizer(part, bits), width, x.dtype)
    return found


def rounded_bytes(state: Mapping[str, Tensor], bits: int) -> int:
    """Bytes of a layer's state with `state_bits=bits`. The tensors need no memory."""
    forms = forms_of(state, bits)
    return sum(_packed_bytes(x, forms[name]) if name in forms else x.nbytes for name, x in state.items())


def _packed_bytes(x: Tensor, form: _Form) -> int:
    rows = math.prod(x.shape[:-1]) * (form.width // form.quantizer.width)
    return rows * form.quantizer.row_bytes


def _keys(state: Mapping[str, Tensor]) -> set[str]:
    """Names of keys and values `[B,S,G,K]` that have a row a token, the last ones the latest: softmax attention's, and
    those that wait until they have left a window.
    """
    names = [name.removesuffix("length") for name in state if name.endswith("length")]
    return {prefix + part for prefix in names for part in ("k", "v", "near_k", "near_v") if prefix + part in state}


def _unpacked(state: State, forms: Mapping[str, _Form]) -> State:
    return {name: forms[name].unpack(x) if name in forms else x for name, x in state.items()}


@cache
def _quantizer(width: int, bits: int) -> TurboQuant:
    return TurboQuant(width, bits)
