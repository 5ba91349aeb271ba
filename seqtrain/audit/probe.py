"""Runs a subject, records what its modules give, and says where two runs first differ by more than rounding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.audit.subject import Subject

# The last entry of a record: the logits.
LOGITS = ""
# How many times the noise two right ways to compute the same may lie apart; noise is what one rounding of each weight
# does. Of 19 families of transformers, right ways lay within 2.2 times of it, wrong ones more than 16,000.
ROUNDINGS = 64
# Without a network to move weights of, half of float32's digits of the largest logit.
BLIND = 2.0**-12
# By module and call, in the order in which calls end.
Record = dict[str, Tensor]


class Probe:
    """A subject, and how exactly its dtype defines what it gives."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self._names = {} if subject.module is None else {each: name for name, each in subject.module.named_modules()}

    def rows(self, *shape: int, seed: int = 1) -> Tensor:
        """Random tokens."""
        return torch.randint(self.subject.vocabulary, shape, generator=torch.Generator().manual_seed(seed))

    def changed(self, tokens: Tensor, where: slice) -> Tensor:
        """`tokens` with others at the places `where`."""
        other = tokens.clone()
        other[:, where] = (
            other[:, where] + 1 + self.rows(*other[:, where].shape, seed=2) % 7
        ) % self.subject.vocabulary
        return other

    @torch.no_grad()
    def record(self, call: Callable[[], Tensor]) -> Record:
        """What each module and at last the whole gives."""
        found: Record = {}
        counts: dict[str, int] = {}

        def keep(module: nn.Module, given: Any, out: Any) -> None:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, Tensor) and first.is_floating_point():
                name = self._names[module]
                counts[name] = counts.get(name, 0) + 1
                found[f"{name}#{counts[name]}"] = first.detach().clone()

        hooks = [module.register_forward_hook(keep) for module, name in self._names.items() if name]
        try:
            logits = call()
        finally:
            for hook in hooks:
                hook.remove()
        return found | {LOGITS: logits.detach().clone()}

    @torch.no_grad()
    def pieces(self, tokens: Tensor, lengths: Sequence[int]) -> Record:
        """The same of `tokens` in pieces that hand on a cache, put together again."""
        assert self.subject.step is not None
        found: dict[str, list[Tensor]] = {}
        cache: Any = None
        for part in tokens.split(list(lengths), 1):

            def call(part: Tensor = part) -> Tensor:
                nonlocal cache
                logits, cache = self.subject.step(part, cache)  # type: ignore[misc]
                return logits

            for name, out in self.record(call).items():
                seen = by_token(out, *part.shape)
                found.setdefault(name, []).extend([] if seen is None else [seen])
        whole = {name: parts for name, parts in found.items() if len(parts) == len(lengths)}
        # What grows with the cache, as attention's weights, is not by token.
        return {k: torch.cat(parts, 1) for k, parts in whole.items() if len({x.shape[2:] for x in parts}) == 1}

    @cached_property
    def noise(self) -> dict[str, float]:
        """By module and call, the largest change that one rounding of every weight makes; at least of its own."""
        tokens = self.rows(1, self.subject.tokens)
        first = self.record(lambda: self.subject.forward(tokens))
        found = {name: torch.finfo(out.dtype).eps * _size(out) for name, out in first.items()}
        if self.subject.module is None:
            return found | {LOGITS: BLIND * _size(first[LOGITS]) / ROUNDINGS}
        for seed in range(3):
            with rounded(self.subject.module, seed):
                again = self.record(lambda: self.subject.forward(tokens))
            for name, out in again.items():
                if name in first and out.shape == first[name].shape:
                    found[name] = max(found[name], _size(out - first[name]))
        return found

    def differs(self, came: Record, expected: Record, places: Tensor) -> str | None:
        """The first module whose outputs at the tokens `places` (bool `[B,T]`) differ by more than rounding.

        LOGITS where only those do, None where these are equal.
        """
        if not self._apart(LOGITS, came[LOGITS], expected[LOGITS], places):
            return None
        names = (name for name in expected if name != LOGITS and name in came)
        return next((name for name in names if self._apart(name, came[name], expected[name], places)), LOGITS)

    def _apart(self, name: str, came: Tensor, expected: Tensor, places: Tensor) -> bool:
        rows, tokens = places.shape
        one, other = by_token(came, rows, tokens), by_token(expected, rows, tokens)
        if one is None or other is None or one.shape != other.shape:
            return False
        one, other = one[places], other[places]
        limit = ROUNDINGS * self.noise.get(name, torch.finfo(other.dtype).eps * _size(other))
        return not torch.equal(one, other) and not _size(one - other) <= limit

    def by(self, came: Record, expected: Record, places: Tensor) -> str:
        """How far the logits are apart, in words."""
        far = _size((came[LOGITS] - expected[LOGITS])[places])
        size = _size(expected[LOGITS])
        return f"logits differ by {far:.1e} (rounding: {self.noise[LOGITS]:.1e}, largest logit {size:.1e})"

    def named(self, where: str | None) -> str:
        """A module as people call it: its name and class."""
        if not where or self.subject.module is None:
            return ""
        name = where.partition("#")[0]
        return f"{name} ({type(self.subject.module.get_submodule(name)).__name__})"


def by_token(out: Tensor, rows: int, tokens: int) -> Tensor | None:
    """`out` as `[B,T,...]`, wherever its axis of time is; None for what has none, as states."""
    if out.shape[:2] == (rows, tokens):
        return out
    if out.dim() and out.shape[0] == rows * tokens:
        return out.unflatten(0, (rows, tokens))
    if not out.dim() or out.shape[0] != rows:
        return None
    axes = [axis for axis in range(1, out.dim()) if out.shape[axis] == tokens]
    return out.movedim(axes[0], 1) if axes else None


def _size(x: Tensor) -> float:
    """The largest number's; inf for what is no number."""
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    return largest if largest == largest else float("inf")


@contextmanager
def rounded(module: nn.Module, seed: int) -> Iterator[None]:
    """Every weight moved by one unit in its last place, up or down."""
    generator = torch.Generator().manual_seed(seed)
    kept = [(weight, weight.detach().clone()) for weight in module.parameters() if weight.is_floating_point()]
    try:
        for weight, value in kept:
            ends = torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1
            weight.data.copy_(torch.nextafter(value, ends * torch.inf))
        yield
    finally:
        for weight, value in kept:
            weight.data.copy_(value)


def gradients(module: nn.Module, call: Callable[[], Tensor], labels: Tensor) -> tuple[float, Mapping[str, Tensor]]:
    """Mean loss of logits and the gradients of every parameter, by name."""
    module.zero_grad()
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(call().flatten(0, 1).float(), labels.flatten())
        loss.backward()
    found = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    module.zero_grad()
    return float(loss.detach()), found
