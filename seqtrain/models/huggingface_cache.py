"""The state of a model as a Hugging Face cache."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from seqtrain.mixers import State


class StateLayer(CacheLayerMixin):
    """One layer's state: tensors whose first dimension is the batch."""

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a state begins with the first tokens, not with keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a state is not made of keys and values; the model replaces it")

    def replace(self, state: State, tokens: int) -> None:
        """The state after `tokens` more tokens, padding counted."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """States are small; they stay where they are."""

    def prefetch(self) -> None:
        """Nothing was moved away."""

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError("a recurrent state can't be taken back, which assisted decoding needs")

    def _each(self, change: Any) -> None:
        if self.state is not None:
            self.state = {key: change(tensor) for key, tensor in self.state.items()}


class StateCache(Cache):
    """The states of all layers."""

    def __init__(self, layers: int):
        self.own = [StateLayer() for _ in range(layers)]
        super().__init__(layers=list(self.own))

    @property
    def states(self) -> list[State] | None:
        """One dict per layer, or None before the first token."""
        states = [layer.state for layer in self.own if layer.state is not None]
        return states or None

    def replace(self, states: list[State], tokens: int) -> None:
        """The states after `tokens` more tokens, padding counted."""
        for layer, state in zip(self.own, states, strict=True):
            layer.replace(state, tokens)

    @property
    def nbytes(self) -> int:
        """Bytes all states take."""
        return sum(tensor.nbytes for state in self.states or [] for tensor in state.values())
