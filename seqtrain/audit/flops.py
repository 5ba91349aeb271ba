"""A claim of FLOPs against what a forward pass multiplies."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from seqtrain.audit.probe import Probe
from seqtrain.audit.subject import Finding, NotChecked
from seqtrain.kernels.operator import Operator

aten = torch.ops.aten
# What formulas leave out: biases, sums, rotations.
LEFT_OUT = 0.02


def flops(probe: Probe) -> Iterator[Finding]:
    """A formula lies between what must be multiplied and what is.

    At least: products with weights, softmax's pairs that a mask leaves, seqtrain's operators as they are defined. At
    most: also convolutions, chunk forms of scans as they run, and twice the pairs, as formulas without a mask count.
    """
    subject = probe.subject
    if subject.flops is None:
        raise NotChecked("no formula given (flops=)")
    claim, tokens = subject.flops(subject.tokens), probe.rows(1, subject.tokens)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Work(subject.module) as work:
        subject.forward(tokens)
    least, most = work.bounds()
    if not least * (1 - LEFT_OUT) <= claim <= most * (1 + LEFT_OUT):
        what = f"{claim:.4g} FLOPs claimed for {subject.tokens} tokens, {least:.4g} to {most:.4g} counted"
        look = "parts the formula leaves out (gates, latent or expert projections, scans)"
        yield Finding("FLOPs", "", what, look if claim < least else "windows and experts that are not used")


class Work(TorchDispatchMode):
    """Counts FLOPs of products, those with weights apart; seqtrain's operators count as declared."""

    def __init__(self, module: nn.Module | None):
        super().__init__()
        weights = module.parameters() if module is not None else ()
        self._weights = {each.untyped_storage().data_ptr() for each in weights}
        self.needed = self.run = 0.0
        # Batched products by the two sizes their scores may have, and pairs that softmax leaves of those sizes.
        self._products: list[tuple[Sequence[int], Sequence[int], float]] = []
        self._pairs: dict[Sequence[int], list[float]] = defaultdict(list)
        self._within = 0
        self._call = Operator.__call__

    def __enter__(self) -> "Work":
        plain = self._call

        def call(operator: Any, *args: Any, **kwargs: Any) -> Any:
            self._within += 1
            try:
                out = plain(operator, *args, **kwargs)
            finally:
                self._within -= 1
            if not self._within:
                tensors, options = operator.arranged(args, kwargs)
                self.needed += operator.flops(tensors, _of_flops(options))
            return out

        Operator.__call__ = call  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Operator.__call__ = self._call  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        packet = function.overloadpacket
        if self._within:
            return out
        if packet in (aten._softmax, aten._safe_softmax):
            scores = args[0]
            seen = scores > torch.finfo(scores.dtype).min / 2
            self._pairs[tuple(scores.shape[-2:])].append(float(seen.float().mean()))
        elif packet in flop_registry:
            count = flop_registry[packet](*args, **kwargs or {}, out_val=out)
            given = [x for x in tree_iter(args) if isinstance(x, Tensor)]
            if packet in (aten.bmm, aten.baddbmm) and not self._of_weights(given):
                left = given[-2]
                self._products.append((tuple(out.shape[-2:]), tuple(left.shape[-2:]), count))
            elif packet in (aten.convolution, aten._convolution):
                self.run += count
            else:
                self.needed += count
        return out

    def _of_weights(self, given: list[Tensor]) -> bool:
        return any(x.untyped_storage().data_ptr() in self._weights for x in given)

    def bounds(self) -> tuple[float, float]:
        """The least and the most a formula may say."""
        least, most = self.needed, self.needed + self.run
        for scores, weights, count in self._products:
            shares = self._pairs.get(scores) or self._pairs.get(weights)
            share = sum(shares) / len(shares) if shares else None
            least += count * share if share is not None else 0
            most += count * min(1, 2 * share) if share is not None else count
        return least, most


def _of_flops(options: dict[str, Any]) -> dict[str, Any]:
    """Options that an operator's cost depends on."""
    return {
        name: value
        for name, value in options.items()
        if name not in ("backend", "initial_state", "cu_seqlens", "scale")
    }
