"""What a step says of its parts, now and then: gradients and updates by weights, losses by place and source."""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from seqtrain.data.batches import IGNORED, Batch, places_of
from seqtrain.memory import peak_resident_bytes
from seqtrain.models.language_model import Head
from seqtrain.runtime.engine import Engine, Sizes
from seqtrain.runtime.metrics import Record
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.settings import PretrainConfig

# Side of the square matrices whose product the peak is measured with, and seconds for which a run measures it.
PEAK_SIDES, PEAK_SECONDS = {"cpu": 1024, "cuda": 8192}, 0.05
# Groups of weights by what is in their names, besides the norms.
GROUPS = {"embedding": "embedding", "head": "head", "mlp": "mlp", "mixer": "mixers"}


def group_of(name: str) -> str:
    """The group that the weight `name` of a language model counts in."""
    words = name.split(".")
    if any("norm" in word for word in words):
        return "norms"
    return next((group for word, group in GROUPS.items() if word in words), "other")


def place_in_document(batch: Batch, places: Tensor) -> Tensor:
    """int64 `[n]`: how many tokens of its document are before each token of `batch`; `places`: theirs in the row."""
    starts = batch.cu_seqlens.long().unique()
    return places - starts[torch.searchsorted(starts, places, right=True) - 1]


class Measures:
    """Takes the figures of those steps that have them; what a step computes is the same with and without."""

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        ranks: Ranks,
        *,
        trained: float,
        flops: float,
        sources: Sequence[str] = (),
    ):
        """`trained`: share of the model's numbers; `flops`: of a token's forward pass, 0 where they aren't known.

        `sources`: names of a batch's.
        """
        self.every, self.engine, self.ranks = config.metrics.every, engine, ranks
        self._length = length = config.train.sequence_length
        self._head = next((module for module in engine.module.modules() if isinstance(module, Head)), None)
        # Of a token: forward, backward to what entered, and to the weights that are trained. MFU is of language models.
        self._flops = (2 + trained) * flops
        self._dtype = getattr(torch, config.train.dtype)
        # Bin k holds the places from 2^(k-1) on.
        self._edges = 2 ** torch.arange(max(length - 1, 0).bit_length())
        self._columns = [*(f"loss_at/{name}" for name in self._bins()), *(f"loss_of/{name}" for name in sources)]
        # Losses, and labels.
        self._sums = torch.zeros(2, len(self._columns), dtype=torch.float64)
        self._peak_flops = 0.0
        self._on = False

    def begin(self, step: int) -> None:
        """Before the passes of `step`, of which the first is 1."""
        self._on = bool(self.every) and step % self.every == 0
        self.engine.sizes = {} if self._on else None
        self._sums.zero_()
        if self._head is not None:
            self._head.losses = [] if self._on else None

    def count(self, batch: Batch, part: int, parts: int, *, backwards: bool = False) -> None:
        """After the passes over `batch`, part `part` of `parts`. `backwards`: its segments ran from last to first."""
        if not self._on or self._head is None or not self._head.losses:
            return
        order = -1 if backwards else 1
        losses = torch.cat(self._head.losses[::order]).cpu().double()
        self._head.losses.clear()
        counted = (batch.labels.flatten() != IGNORED).cpu()
        places = torch.cat([torch.arange(own.start, own.stop) for own in places_of(batch.offsets, part, parts)])
        columns = [torch.bucketize(place_in_document(batch, places), self._edges, right=True)]
        if batch.sources:
            columns.append(len(self._edges) + 1 + torch.tensor(batch.sources)[places // self._length])
        for column in columns:
            self._sums[0].index_add_(0, column, losses)
            self._sums[1].index_add_(0, column, counted.double())

    def finish(self, record: Record) -> Record:
        """`record`, that of the step, with what was measured. A collective of all ranks."""
        if not self._on:
            return record
        device = self.ranks.device
        self._peak_flops = self._peak_flops or matrix_flops(device, self._dtype, seconds=PEAK_SECONDS)
        groups = by_group(self.engine.sizes or {}, self.engine.optimizer_state.names)
        sizes = [value for each in groups.values() for value in each]
        memory = self.ranks.largest(peak_bytes(device))
        peak, *shared = self.ranks.sum(self._peak_flops, *sizes, *self._sums.flatten().tolist())
        found: Record = {"peak_memory_bytes": int(memory)}
        if self._flops:
            found["mfu"] = self._flops * record["tokens_per_second"] / peak
        found["grad_norm_l1"] = sum(shared[1 : len(sizes) : 3])
        for group, squares, moved in zip(groups, shared[0 : len(sizes) : 3], shared[2 : len(sizes) : 3], strict=True):
            found |= {f"grad_norm/{group}": squares**0.5, f"update_norm/{group}": moved**0.5}
        columns = len(self._columns)
        sums = zip(self._columns, shared[len(sizes) : -columns], shared[-columns:], strict=True)
        return record | found | {name: loss / count for name, loss, count in sums if count}

    def _bins(self) -> Iterable[str]:
        for first, next_first in zip([0, *self._edges.tolist()], [*self._edges.tolist(), None], strict=True):
            last = 2 * first - 1 if next_first is None else next_first - 1
            yield f"{first}-{last}" if last > first else f"{first}"


def by_group(sizes: Mapping[str, Sizes], names: Iterable[str]) -> dict[str, Sizes]:
    """What `sizes` says of each weight, summed by group; with all groups of `names`."""
    found: dict[str, Sizes] = {group_of(name): (0.0, 0.0, 0.0) for name in names}
    for name, (squares, length, moved) in sizes.items():
        before = found[group_of(name)]
        found[group_of(name)] = (before[0] + squares, before[1] + length, before[2] + moved)
    return found


def peak_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU, or resident on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def matrix_flops(device: torch.device, dtype: torch.dtype, *, seconds: float) -> float:
    """Operations per second of the fastest of many products of square matrices, measured for `seconds`."""
    side = PEAK_SIDES[device.type]
    # The run's own draws stay as they are.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)
