"""Giving the ranks of a run what a checkpoint holds: each reads and checks its share, and nothing twice."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqtrain.errors import CheckpointError, DamagedError
from seqtrain.initialization import Fill
from seqtrain.runtime.checkpoint import Checkpoint
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.slices import WEIGHT
from seqtrain.weights import check_finite

log = logging.getLogger("seqtrain.runtime")

# Of an optimizer that averages: the weights in training, where a checkpoint's are the averaged ones.
IN_TRAINING = "y"
Result = TypeVar("Result")


class Restoration:
    """A checkpoint as the ranks of a run read it, all in the same order.

    What every rank needs whole is read by all, a share each, and sent to the others. A rank that finds damage goes on
    with zeros, so that none waits for it; `agree` ends it on all.
    """

    def __init__(self, checkpoint: Checkpoint, ranks: Ranks, replicas: dist.ProcessGroup | None = None):
        """`replicas`: ranks that hold the same pieces as this one, where ZeRO divides over some of the ranks."""
        self.checkpoint, self._ranks, self._replicas = checkpoint, ranks, replicas
        self._tensors = checkpoint.tensors()
        self._error: CheckpointError | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """What the optimizer had besides moments."""
        return self._tensors.numbers

    @property
    def bytes(self) -> int:
        """So many has this rank read."""
        return self._tensors.bytes

    def agree(self) -> None:
        """A collective that raises `DamagedError` on all ranks where one has found damage."""
        for error in filter(None, self._ranks.gather(self._error)):
            raise error

    def _tried(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """What `work` gives; `otherwise` where it finds damage, which is kept for `agree`."""
        try:
            return work()
        except CheckpointError as error:
            self._error = self._error or error
            return otherwise

    def own(self, name: str, key: str, begin: int, end: int) -> Tensor:
        """The numbers `begin` to `end` of a flattened tensor that this rank holds. A collective of its replicas."""
        out = torch.empty(end - begin, device=self._ranks.device)
        self._own(out, begin, lambda first, last: self._tensors.range(name, key, first, last))
        return out

    def _own(self, out: Tensor, begin: int, read: Callable[[int, int], Tensor]) -> None:
        """Fills `out` with the numbers from `begin` on that `read` gives."""
        if self._replicas is None:
            out.copy_(self._read(read, begin, begin + len(out)))
        else:
            self._share(out, lambda first, last: read(begin + first, begin + last), self._replicas)

    def _read(self, read: Callable[[int, int], Tensor], begin: int, end: int) -> Tensor:
        return self._tried(lambda: read(begin, end), torch.zeros(end - begin))

    def whole(self, name: str, key: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole tensor, on the ranks' device. A collective."""
        out = torch.empty(shape, dtype=dtype, device=self._ranks.device)
        self._share(out, lambda begin, end: self._tensors.range(name, key, begin, end), self._ranks.group)
        return out

    def _share(self, out: Tensor, read: Callable[[int, int], Tensor], group: dist.ProcessGroup) -> None:
        """Fills `out` with what `read` gives, of which each rank of `group` reads its share. They all call it."""
        count, numbers = group.size(), out.numel()
        if count == 1 or not numbers:
            out.view(-1).copy_(self._read(read, 0, numbers))
            return
        piece = -(-numbers // count)
        begin, end = (min(place * piece, numbers) for place in (group.rank(), group.rank() + 1))
        padded = torch.zeros(piece, dtype=out.dtype, device=out.device)
        padded[: end - begin] = self._read(read, begin, end).to(out.device)
        all_of = torch.empty(count * piece, dtype=out.dtype, device=out.device)
        # Bytes: gloo sends no numbers of other kinds than float and integers of its own.
        dist.all_gather(list(all_of.view(torch.uint8).chunk(count)), padded.view(torch.uint8), group=group)
        out.view(-1).copy_(all_of[:numbers])

    def weights(self, model: nn.Module, *, frozen: Collection[str], others: Fill | None) -> Fill:
        """Gives the tensors of `model`, which is whole, the numbers they are trained on with. A collective for each.

        `frozen`: names of parameters that the checkpoint does not hold. `others`: fills those; None: nothing does.
        Raises `CheckpointError` naming the first tensor that doesn't fit.
        """
        checkpoint = self.checkpoint
        shapes: Mapping[str, Sequence[int]] | None = self._tried(lambda: self._tensors.shapes, None)
        if shapes is not None:
            checkpoint.check_names(shapes.keys(), model, frozen)
        there = set(shapes or ())

        def read(name: str, begin: int, end: int) -> Tensor:
            key = IN_TRAINING if self._tensors.has(name, IN_TRAINING) else WEIGHT
            value = self._tensors.range(name, key, begin, end)
            check_finite(checkpoint.folder, name, value)
            return value

        def fill(name: str, whole: Tensor, own: slice) -> None:
            if name not in there:
                if others is not None:
                    others(name, whole, own)
                return
            assert shapes is not None
            checkpoint.check_shape(name, shapes[name], whole.shape)

            begin, end, _ = own.indices(whole.numel())
            if (begin, end) == (0, whole.numel()):
                self._share(whole, partial(read, name), self._ranks.group)
            elif begin < end:
                self._own(whole.view(-1)[begin:end], begin, partial(read, name))

        return fill

    def states(self, name: str, numbers: Sequence[int], *, shared: bool) -> dict[int, dict[str, Tensor]]:
        """States of matrices of a weight by their numbers; `shared`: all ranks ask for the same ones. A collective."""
        ranks = self._ranks
        own = numbers[ranks.rank :: ranks.count] if shared else numbers
        nothing: dict[int, dict[str, Tensor]] = {}
        found = self._tried(lambda: self._tensors.states(name, own), nothing) if own else nothing
        if self._error is None and (missing := sorted(set(own) - found.keys())):
            self._error = DamagedError(f"{self.checkpoint.folder}: no state of matrix {missing[0]} of {name}")
        if not shared:
            return found
        everyone: list[dict[int, Any]] = ranks.gather(found)
        return {number: state for each in everyone for number, state in each.items()}
