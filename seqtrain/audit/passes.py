"""What different ways through a model must agree on: the past, a batch, padding, a cache, documents, pieces."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from seqtrain.audit.probe import LOGITS, ROUNDINGS, Probe, Record, by_token, gradients, rounded
from seqtrain.audit.subject import Finding, NotChecked

# Tokens of padding on the left, and tokens decoded one by one.
PADDING, DECODED = 9, 12
# No short convolution looks back further; further away, a state that decays fast would show nothing either.
REACH = 4


def future(probe: Probe) -> Iterator[Finding]:
    """The future never changes the past."""
    tokens, count = probe.rows(1, probe.subject.tokens), 2 * probe.subject.tokens // 3
    places = torch.arange(probe.subject.tokens)[None] < count
    records = [
        probe.record(partial(probe.subject.forward, x)) for x in (tokens, probe.changed(tokens, slice(count, None)))
    ]
    yield from _finding(
        probe, "future", records, places, "the causal mask, a convolution's padding, or a mean over time"
    )


def batch(probe: Probe) -> Iterator[Finding]:
    """A row gives the same alone and beside others."""
    tokens = probe.rows(3, probe.subject.tokens)
    came = probe.record(lambda: probe.subject.forward(tokens))
    expected = _joined([(probe.record(partial(probe.subject.forward, x)), 1, x.shape[1]) for x in tokens.split(1)], 0)
    places = torch.ones_like(tokens, dtype=torch.bool)
    look = "what is shared between rows: a state's shape, a capacity of experts, statistics over the batch"
    yield from _finding(probe, "batch", (came, expected), places, look)


def padding(probe: Probe) -> Iterator[Finding]:
    """Padding on the left changes nothing."""
    padded = _needed(probe.subject.padded, "padded")
    tokens = probe.rows(2, probe.subject.tokens)
    mask = torch.ones_like(tokens)
    mask[1, :PADDING], tokens[1, :PADDING] = 0, 0
    record = probe.record(lambda: padded(tokens, mask))
    came = {
        name: seen[1:, PADDING:] for name, out in record.items() if (seen := by_token(out, *tokens.shape)) is not None
    }
    expected = probe.record(lambda: probe.subject.forward(tokens[1:, PADDING:]))
    places = torch.ones(1, tokens.shape[1] - PADDING, dtype=torch.bool)
    look = "what padding enters: the convolution, the state's update and decay, the attention mask, positions"
    yield from _finding(probe, "left padding", (came, expected), places, look)


def decoding(probe: Probe) -> Iterator[Finding]:
    """Token by token with a cache gives what the full pass gives."""
    lengths = [probe.subject.tokens - DECODED, *[1] * DECODED]
    look = "the cache's convolution and state, the one-token path (limits, norms, scales), positions"
    yield from _pieces(probe, "cached decoding", lengths, look)


def chunked_prefill(probe: Probe) -> Iterator[Finding]:
    """A prompt read in pieces gives what the full pass gives."""
    first = probe.subject.tokens // 2
    lengths = [first, 2, 7, probe.subject.tokens - first - 9]
    look = "several tokens behind a cache: the state a scan starts from, the convolution's last inputs"
    yield from _pieces(probe, "chunked prefill", lengths, look)


def documents(probe: Probe, form: str) -> Iterator[Finding]:
    """A document packed into a row changes no other one, and gives what it gives alone.

    Bits that differ by no more than rounding are no leak: decays summed over the row round by what stood before.
    """
    call, tokens = probe.subject.packed[form], probe.rows(1, probe.subject.tokens)
    lengths = [29 * len(tokens[0]) // 101, 5, len(tokens[0]) - 29 * len(tokens[0]) // 101 - 5]
    ends, check = [lengths[0], lengths[0] + 5], f"documents by {form}"
    expected, place = probe.record(lambda: call(tokens, lengths)), torch.arange(len(tokens[0]))[None]

    def leak(changed: slice, places: Tensor) -> str | None:
        came = probe.record(lambda: call(probe.changed(tokens, changed), lengths))
        return probe.differs(came, expected, places)

    early, late = (leak(each, place >= ends[0]) for each in (slice(ends[0] - REACH), slice(ends[0] - 1, ends[0])))
    if early is None and late is None:
        early = late = leak(slice(*ends), (place < ends[0]) | (place >= ends[1]))
    found = list(_leaks(probe, check, early, late))
    yield from found
    if not found:
        parts = [(probe.record(partial(probe.subject.forward, x)), 1, x.shape[1]) for x in tokens.split(lengths, 1)]
        look = "positions, and what starts anew within a document or not at its start"
        yield from _finding(probe, check, (expected, _joined(parts, 1)), place >= 0, look)


def _leaks(probe: Probe, check: str, early: str | None, late: str | None) -> Iterator[Finding]:
    """What a change far from a document's end, and one at its very end, tell of the way to the next one."""
    if early is not None and _attends(probe, early):
        yield Finding(
            check, probe.named(early), "attention sees other documents", "its mask, whether it is told of documents"
        )
    elif (
        early is not None
        and not _convolves(probe, early)
        and (LOGITS in (early, late) or _layer(early) == _layer(late))
    ):
        look = "whether boundaries reach the scan (cu_seqlens, seq_idx), and the convolution beside it"
        yield Finding(check, probe.named(early), "the state runs on into the next document", look)
    apart = early is None or _layer(early) != _layer(late)
    if late is not None and not _attends(probe, late) and (apart or _convolves(probe, late)):
        what = "the convolution runs on into the next document"
        yield Finding(check, probe.named(late), what, "whether the convolution, and the scan, are told of boundaries")


def _convolves(probe: Probe, where: str) -> bool:
    return "Conv" in probe.named(where).rpartition(" ")[2]


def _attends(probe: Probe, where: str) -> bool:
    """Whether a module belongs to softmax attention."""
    names = where.partition("#")[0].split(".")
    around = [".".join(names[: end + 1]) for end in range(len(names))] if where else []
    titles = [type(probe.subject.module.get_submodule(name)).__name__ for name in around if probe.subject.module]
    return any(
        "Attention" in title and not any(x in title for x in ("Linear", "Delta", "Lightning")) for title in titles
    )


def _layer(where: str | None) -> str:
    """`model.layers.0` of `model.layers.0.mixer.norm#1`."""
    names = (where or "").partition("#")[0].split(".")
    ends = [index for index, name in enumerate(names) if name.isdigit()]
    return ".".join(names[: ends[0] + 1]) if ends else ""


def pieces_gradients(probe: Probe) -> Iterator[Finding]:
    """A row in two pieces gives the whole one's loss and gradients."""
    subject = probe.subject
    if subject.module is None:
        raise NotChecked("needs the network (module=)")
    row = probe.rows(1, subject.tokens + 1)
    tokens, labels, lengths = row[:, :-1], row[:, 1:], [subject.tokens // 2 + 1, (subject.tokens - 1) // 2]
    cut = subject.cut or _by_steps(probe, tokens, lengths)
    whole = gradients(subject.module, lambda: subject.forward(tokens), labels)
    came = gradients(subject.module, lambda: cut(tokens, lengths), labels)
    limits = _gradient_limits(probe, whole, tokens, labels)
    check, look = (
        "gradients of pieces",
        "a state handed on without its gradient, or what is summed over pieces or ranks",
    )
    if not abs(came[0] - whole[0]) <= limits[LOGITS]:
        yield Finding(check, "", f"the loss is {came[0]:.6f}, of the whole {whole[0]:.6f}", look)
    far = {name: float((came[1].get(name, 0 * grad) - grad).norm()) for name, grad in whole[1].items()}
    beyond = {name: size / limits[name] for name, size in far.items() if not size <= limits[name]}
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name])
        size = far[worst] / float(whole[1][worst].norm())
        yield Finding(check, worst, f"its gradient is off by {size:.1%}, and {len(beyond)} of {len(far)} are", look)


def _by_steps(probe: Probe, tokens: Tensor, lengths: Sequence[int]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Pieces that hand on the cache, if their logits are right."""
    step = _needed(probe.subject.step, "step or cut")
    came, expected = probe.pieces(tokens, lengths), probe.record(lambda: probe.subject.forward(tokens))
    places = torch.ones_like(tokens, dtype=torch.bool)
    if probe.differs(came, expected, places) is not None:
        raise NotChecked("the logits of pieces differ already: chunked prefill")

    def cut(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        found, cache = [], None
        for part in tokens.split(list(lengths), 1):
            logits, cache = step(part, cache)
            found.append(logits)
        return torch.cat(found, 1)

    return cut


def _gradient_limits(probe: Probe, whole: tuple, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """By parameter, what rounding may change a gradient by; under LOGITS the loss."""
    eps, largest = torch.finfo(torch.float32).eps, max(float(grad.norm()) for grad in whole[1].values())
    noise = dict.fromkeys(whole[1], eps * largest) | {LOGITS: eps * abs(whole[0])}
    module = probe.subject.module
    assert module is not None
    for seed in range(3):
        with rounded(module, seed):
            loss, other = gradients(module, lambda: probe.subject.forward(tokens), labels)
        for name, grad in whole[1].items():
            noise[name] = max(noise[name], float((other[name] - grad).norm()))
        noise[LOGITS] = max(noise[LOGITS], abs(loss - whole[0]))
    return {name: ROUNDINGS * size for name, size in noise.items()}


def _pieces(probe: Probe, check: str, lengths: Sequence[int], look: str) -> Iterator[Finding]:
    _needed(probe.subject.step, "step")
    tokens = probe.rows(1, probe.subject.tokens)
    came, expected = probe.pieces(tokens, lengths), probe.record(lambda: probe.subject.forward(tokens))
    yield from _finding(probe, check, (came, expected), torch.ones_like(tokens, dtype=torch.bool), look)


def _finding(probe: Probe, check: str, records: Sequence[Record], places: Tensor, look: str) -> Iterator[Finding]:
    """One where the two differ by more than rounding."""
    came, expected = records
    where = probe.differs(came, expected, places)
    if where is not None:
        yield Finding(check, probe.named(where), probe.by(came, expected, places), look)


def _joined(parts: Sequence[tuple[Record, int, int]], axis: int) -> Record:
    """Records of rows and tokens each, put together along `axis`."""
    seen = [{name: by_token(out, *shape) for name, out in record.items()} for record, *shape in parts]
    found = {name: [x for each in seen if (x := each.get(name)) is not None] for name in seen[0]}
    return {name: torch.cat(each, axis) for name, each in found.items() if len(each) == len(parts)}


def _needed(function: Callable | None, name: str) -> Callable:
    if function is None:
        raise NotChecked(f"no such function ({name}=)")
    return function
