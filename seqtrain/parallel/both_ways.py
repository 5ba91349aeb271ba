"""A sequence every token of which sees all of its document: what encoders run the same mixers on.

* Sums over the tokens before become sums over all: linear attention without a decay is one sum of `k^T v` a document,
  Kronecker attention one of each of its keys, which ranks add up by an all-reduce where a scan would carry it along.
* Softmax attention, unless it has a window, has no mask; ranks gather keys and values.
* What depends on the order runs in both directions, and both outputs are added.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqtrain.kernels import kronecker_attention, linear_attention, softmax_attention, tensor_attention
from seqtrain.kernels.dispatch import full_precision
from seqtrain.kernels.documents import boundaries_of, state_dtype
from seqtrain.kernels.kronecker_attention import read_sums, sums_of
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.scan import keep_in_graph
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.parallel.sharded import ShardedSequence
from seqtrain.parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class BothWays(SequenceContext):
    """`inner` as an encoder reads it; states that come back are of no use, and none may be given. Made by `of`."""

    inner: SequenceContext
    # The sequence before its tokens were repeated, and how often they are: copies of a token keep their order.
    plain: SequenceContext
    times: int = 1

    @classmethod
    def of(cls, inner: SequenceContext) -> "BothWays":
        return cls(cu_seqlens=inner.cu_seqlens, backend=inner.backend, inner=inner, plain=inner)

    @property
    def sends(self) -> bool:  # type: ignore[override]
        return self.inner.sends

    @property
    def one_way(self) -> SequenceContext:
        return self.inner

    def _run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def run(
        self, operator: Any, *tensors: Tensor | None, initial_state: Any = None, **options: Any
    ) -> tuple[Tensor, Any]:
        if initial_state is not None:
            raise ValueError("model.kind=encoder: every token sees all others at once, so no state can be continued")
        given, others = operator.arranged(tensors, options)
        if not self.inner.counts:
            if operator is linear_attention and given[3] is None:
                return self._summed(*given[:3], **others), None
            if operator is softmax_attention and others.get("window") is None:
                return self._attended(*given, **others), {}
            if operator is tensor_attention:
                q, k1, k2, v1, v2 = given
                return self._multiplied(q, torch.stack([k1, k2], 3), torch.stack([v1, v2], 3), **others), None
            if operator is kronecker_attention:
                return self._multiplied(*given, **others), None
        out, state = self.inner.run(operator, *given, **others)
        added = operator in (tensor_attention, kronecker_attention)
        if self.inner.counts and (added or (operator is linear_attention and given[3] is None)):
            return out, state
        timed = operator.along_time(given)
        turned = (self.reverse(x) if along else x for x, along in zip(given, timed, strict=True))
        back, _ = self.inner.run(operator, *turned, **others)
        return out + self.reverse(back), state

    def grouped(self, size: int, past: Tensor | None = None, shift: int = 0) -> SequenceContext:
        raise ValueError(f"model.kind=encoder: a layer in groups of {size} tokens isn't there for encoders")

    def repeated(self, times: int) -> "BothWays":
        repeated = self.inner.repeated(times)
        return replace(self, cu_seqlens=repeated.cu_seqlens, inner=repeated, times=times * self.times)

    def reverse(self, x: Tensor) -> Tensor:
        if self.times == 1:
            return self.inner.reverse(x)
        return self.plain.reverse(x.unflatten(1, (-1, self.times))).flatten(1, 2)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.inner.positions(tokens, device)

    def count(self, past: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.inner.count(past, batch, tokens, device)

    def pieces(self) -> list[slice]:
        """The tokens here of each document that has some here, or all, of B rows."""
        if isinstance(self.inner, ShardedSequence):
            ends: Sequence[int] = self.inner.own_boundaries
        elif self.inner.cu_seqlens is None:
            return [slice(None)]
        else:
            ends = boundaries_of(self.inner.cu_seqlens)
        return [slice(*pair) for pair in pairwise(ends)]

    def totals(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the `pieces`, all of one shape, as sums over their whole documents: one all-reduce over ranks."""
        sequence = self.inner
        if not isinstance(sequence, ShardedSequence):
            return list(sums)
        # Documents that several ranks have tokens of, each once.
        inside = set(sequence.offsets[1:-1]).difference(sequence.boundaries)
        crossing = sorted({bisect_right(sequence.boundaries, offset) - 1 for offset in inside})
        if not crossing:
            return list(sums)
        last = len(sequence.boundaries) - 2
        starts = [sequence.start + piece.start for piece in self.pieces()]
        documents = [min(bisect_right(sequence.boundaries, start) - 1, last) for start in starts]
        own = [sums[documents.index(each)] if each in documents else torch.zeros_like(sums[0]) for each in crossing]
        group = sequence.group
        whole = TensorParallel(group.rank(), group.size(), group).total(torch.stack(own))
        found = [
            whole[crossing.index(document)] if document in crossing else part
            for document, part in zip(documents, sums, strict=True)
        ]
        # Every rank's loss must depend on what all of them exchange.
        return [keep_in_graph(part, whole) for part in found]

    def documents(self) -> list[slice]:
        """The tokens of each document of the whole row; of B rows all."""
        sequence = self.inner
        return (
            [slice(*pair) for pair in pairwise(sequence.boundaries)]
            if isinstance(sequence, ShardedSequence)
            else self.pieces()
        )

    def by_channels(self, x: Tensor) -> Tensor:
        """All tokens of this rank's part of the channels, `[B,T,D/P]`, of `x: [B,T_r,D]`: an all-to-all."""
        sequence = self.inner
        if not isinstance(sequence, ShardedSequence):
            return x
        (batch, tokens), ranks = x.shape[:2], sequence.group.size()
        width = batch * x.shape[2] // ranks
        # P T_r B D/P
        leaving = x.transpose(0, 1).unflatten(2, (ranks, -1)).movedim(2, 0).reshape(-1)
        to, come = ranks * [tokens * width], [(end - start) * width for start, end in pairwise(sequence.offsets)]
        came = exchange(leaving, to, come, group=sequence.group, agreed=f"channels {sequence.offsets} {width}")
        return came.view(-1, batch, x.shape[2] // ranks).transpose(0, 1)

    def by_tokens(self, x: Tensor) -> Tensor:
        """The reverse: `[B,T,D/P]` -> `[B,T_r,D]`."""
        sequence = self.inner
        if not isinstance(sequence, ShardedSequence):
            return x
        batch, _, part = x.shape
        tokens, ranks = sequence.end - sequence.start, sequence.group.size()
        to = [(end - start) * batch * part for start, end in pairwise(sequence.offsets)]
        come = ranks * [tokens * batch * part]
        leaving = x.transpose(0, 1).reshape(-1)
        came = exchange(leaving, to, come, group=sequence.group, agreed=f"tokens {sequence.offsets} {part}")
        return came.view(ranks, tokens, batch, part).permute(2, 1, 0, 3).flatten(2)

    @property
    def channel_part(self) -> tuple[int, int]:
        """Of how many parts of the channels `by_channels` gives which: `(rank, ranks)`."""
        group = self.inner.group if isinstance(self.inner, ShardedSequence) else None
        return (0, 1) if group is None else (group.rank(), group.size())

    def _summed(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """`out_t = scale q_t sum_j k_j^T v_j` over all tokens of the document."""
        dtype = state_dtype(q.dtype, k.dtype, v.dtype)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        pieces = self.pieces()
        with full_precision(q.device):
            wide_q, wide_k, wide_v = (x.to(dtype) for x in (q, k, v))
            sums = [torch.einsum("bthk,bthv->bhkv", wide_k[:, piece], wide_v[:, piece]) for piece in pieces]
            outs = [
                scale * torch.einsum("bthk,bhkv->bthv", wide_q[:, piece], total)
                for piece, total in zip(pieces, self.totals(sums), strict=True)
            ]
        return torch.cat(outs, 1).to(v.dtype)

    def _multiplied(
        self, q: Tensor, keys: Tensor, values: Tensor, *, degree: int, scale: float | None = None
    ) -> Tensor:
        """Kronecker attention over all tokens of the document."""
        pieces, scale = self.pieces(), q.shape[-1] ** -0.5 if scale is None else scale
        sums = [sums_of(keys[:, piece], values[:, piece], degree) for piece in pieces]
        outs = [
            read_sums(q[:, piece], total, degree, scale) for piece, total in zip(pieces, self.totals(sums), strict=True)
        ]
        return torch.cat(outs, 1).to(values.dtype)

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        score_cap: float = 0.0,
    ) -> Tensor:
        if score_cap:
            raise ValueError("model.kind=encoder: attention with score_cap isn't there for encoders; leave it 0")
        ends, first, sequence = self.pieces(), 0, self.inner
        spans = ends
        if isinstance(sequence, ShardedSequence):
            k, v = (self._gathered(x) for x in (k, v))
            first, starts = sequence.start, sequence.boundaries
            last = len(starts) - 2
            documents = (min(bisect_right(starts, first + piece.start) - 1, last) for piece in ends)
            spans = [slice(starts[index], starts[index + 1]) for index in documents]
        outs = []
        for piece, span in zip(ends, spans, strict=True):
            asked, keys, values = (x.transpose(1, 2) for x in (q[:, piece], k[:, span], v[:, span]))
            grouped = q.shape[2] != k.shape[2]
            read = F.scaled_dot_product_attention(asked, keys, values, scale=scale, enable_gqa=grouped)
            outs.append(read.transpose(1, 2))
        return keep_in_graph(torch.cat(outs, 1).to(v.dtype), k, v)

    def _gathered(self, x: Tensor) -> Tensor:
        """The whole row of `x: [B,T_r,...]`, `[B,T,...]`."""
        sequence = self.inner
        assert isinstance(sequence, ShardedSequence)
        rest, (batch, tokens) = x.shape[2:], x.shape[:2]
        width, ranks = batch * rest.numel(), sequence.group.size()
        lengths = [end - start for start, end in pairwise(sequence.offsets)]
        mine = x.transpose(0, 1).reshape(-1).repeat(ranks)
        to, come = ranks * [tokens * width], [length * width for length in lengths]
        agreed = f"gather {sequence.offsets} {width}"
        whole = exchange(mine, to, come, group=sequence.group, agreed=agreed)
        return whole.view(-1, batch, *rest).transpose(0, 1)
