"""A batch as Hugging Face describes it, padded or packed, as one row of documents: what no layer has to know of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.mixers import State


@dataclass(frozen=True)
class Packing:
    """The real tokens of a batch `[B,T]` as one row of N documents, row by row.

    `real`, `starts`: bool `[B,T]`, tokens that are no padding, and those that begin a document behind another of their
    row. `boundaries`: int64 `[N+1]`. `first`, `last`: int64 `[B]`, the documents that continue a row's past, and those
    that end it; a row without real tokens has one of no tokens.
    """

    real: Tensor
    starts: Tensor
    boundaries: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, real: Tensor, starts: Tensor) -> "Packing":
        """From `real` and `starts`, which is False for padding and at a row's first real token."""
        counts, inner = real.sum(1), starts.sum(1)
        rows = counts.cumsum(0) - counts
        borders = torch.cat([rows, starts[real].nonzero()[:, 0]]).sort().values
        last = (inner + 1).cumsum(0) - 1
        return cls(real, starts, torch.cat([borders, counts.sum()[None]]), last - inner, last)

    def pack(self, x: Tensor) -> Tensor:
        """`[B,T,...]` -> `[1,total,...]`."""
        return x[self.real][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """What `pack` undoes; zeros for padding."""
        x = packed.new_zeros(*self.real.shape, *packed.shape[2:])
        x[self.real] = packed[0]
        return x

    def predicted(self) -> Tensor:
        """bool `[B,T]`: tokens that the one before them in the batch, if any, was to predict: not padding, no start."""
        follows = torch.nn.functional.pad(self.real[:, :-1], (1, 0), value=True)
        return self.real & follows & ~self.starts

    def past(self, state: State) -> State:
        """A layer's states of B rows as those its documents begin with: empty where they follow another."""
        count, held = len(self.boundaries) - 1, {}
        softmax = _softmax_keys(state)
        for name, tensor in state.items():
            if (length := softmax.get(name)) is not None:
                # Keys and values of all documents lie one after the other.
                places = torch.arange(tensor.shape[1], device=tensor.device)
                held[name] = tensor[places >= tensor.shape[1] - state[length][:, None]][None]
            else:
                held[name] = tensor.new_zeros(count, *tensor.shape[1:]).index_copy(0, self.first, tensor)
        return held

    def after(self, state: State) -> State:
        """A layer's states of N documents as those of B rows."""
        softmax = _softmax_keys(state)
        rows = {name: tensor[self.last] for name, tensor in state.items() if name not in softmax}
        for name, length in softmax.items():
            parts = state[name][0].split(state[length].tolist())
            kept = [parts[document] for document in self.last.tolist()]
            longest = max(map(len, kept))
            rows[name] = torch.stack(
                [torch.cat([part.new_zeros(longest - len(part), *part.shape[1:]), part]) for part in kept]
            )
        return rows


def _softmax_keys(state: State) -> dict[str, str]:
    """Names of the keys and values that `softmax_attention` holds, each with that of their number.

    With documents they are concatenated without padding, in rows they are padded in front. All else has a row each in
    both forms, windows with sinks too.
    """
    prefixes = [name.removesuffix("length") for name in state if name.endswith("length")]
    return {f"{p}{kind}": f"{p}length" for p in prefixes if f"{p}sink_k" not in state for kind in ("k", "v")}


def packing_of(
    x: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    seq_idx: Tensor | None,
    seen: int,
) -> Packing | None:
    """How `x: [B,T,...]` is padded and packed, None where it is neither. `seen`: tokens before it, padding counted.

    The arguments are those of `SeqtrainForCausalLM.forward`. Raises `ValueError` for what can't be followed.
    """
    batch, tokens = x.shape[:2]
    real = _real(attention_mask, batch, tokens)
    if seen and not (cu_seq_lens is None and seq_idx is None):
        raise ValueError(f"cu_seq_lens_q, seq_idx: samples can't be packed behind the {seen} tokens of a cache")
    starts = torch.zeros(batch, tokens, dtype=torch.bool, device=x.device)
    if cu_seq_lens is not None:
        _check_boundaries(cu_seq_lens, batch * tokens, padded=real is not None)
        inner = cu_seq_lens[(cu_seq_lens > 0) & (cu_seq_lens < batch * tokens)]
        starts.view(-1)[inner.to(device=x.device, dtype=torch.int64)] = True
    if seq_idx is not None:
        numbers = _rows("seq_idx", seq_idx, batch, tokens)
        starts[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    given = torch.ones_like(starts) if real is None else real
    if position_ids is not None:
        places = _rows("position_ids", position_ids, batch, tokens)
        starts[given] = _falls(places[given], starts[given], given, _continued(attention_mask, given, seen))
    # A row's first token continues its past, or begins anyway.
    starts &= given & (given.cumsum(1) > 1)
    return None if real is None and not bool(starts.any()) else Packing.of(given, starts)


def _real(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Where `mask` says that this call's tokens are no padding; None: everywhere."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        came = f"attention_mask has shape {tuple(mask.shape)}"
        raise ValueError(f"{came}, expected [{batch}, {tokens}], or longer by the tokens of a cache")
    mask = mask[:, mask.shape[1] - tokens :]
    real = mask == 1
    if bool(real.all()):
        return None
    if not bool((real | (mask == 0)).all()):
        raise ValueError("attention_mask holds other numbers than 0 and 1; number packed samples by seq_idx")
    return real


def _check_boundaries(boundaries: Tensor, tokens: int, *, padded: bool) -> None:
    if padded:
        raise ValueError("cu_seq_lens_q: an attention_mask with padding says something else; give one of them")
    ends = boundaries.dim() == 1 and len(boundaries) > 1 and [int(boundaries[0]), int(boundaries[-1])]
    if ends != [0, tokens] or bool((boundaries.diff() < 0).any()):
        raise ValueError(f"cu_seq_lens_q={boundaries.tolist()}: expected to rise from 0 to the {tokens} tokens")


def _rows(name: str, numbers: Tensor, batch: int, tokens: int) -> Tensor:
    """`[B,T]` or `[1,T]` as `[B,T]`."""
    if numbers.dim() != 2 or numbers.shape[0] not in (1, batch) or numbers.shape[1] != tokens:
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}, expected [{batch}, {tokens}]")
    return numbers.expand(batch, -1)


def _continued(mask: Tensor | None, given: Tensor, seen: int) -> Tensor:
    """bool `[B]`: rows that have real tokens before this call."""
    batch, tokens = given.shape
    if mask is not None and seen and mask.shape[1] == seen + tokens:
        return mask[:, :seen].bool().any(1)
    return torch.full((batch,), seen > 0, device=given.device)


def _falls(places: Tensor, known: Tensor, given: Tensor, continued: Tensor) -> Tensor:
    """bool `[total]`: where positions of real tokens, `places: [total]`, begin anew. `known`: starts known already;
    `continued: bool [B]`: rows with a past.

    Positions follow from the tokens, so that they may neither leave some out nor begin anew behind a cache.
    """
    row = torch.arange(len(given), device=given.device).repeat_interleave(given.sum(1))
    rise = torch.nn.functional.pad(places.diff(), (1, 0), value=1)
    inside = torch.nn.functional.pad(row.diff() == 0, (1, 0), value=False)
    if bool((inside & ~known & (rise > 1)).any()):
        raise ValueError("position_ids leave positions out within a sample, and these layers count their tokens")
    if bool((~inside & (places <= 0) & continued[row]).any()):
        raise ValueError("position_ids begin anew behind a cache; give a new sample without past_key_values")
    return known | (inside & (rise < 1))
