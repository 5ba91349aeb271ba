"""Checks of a conversion: whether the forms of a student agree, and whether training reached its goals."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.measure import Converted, converted_mixers
from seqtrain.convert.settings import VerifyConfig
from seqtrain.mixers.common.liger import Liger
from seqtrain.mixers.linearized_attention import LinearizedAttention
from seqtrain.models import LanguageModel
from seqtrain.testing import relative_error

# Largest relative error between two ways to compute the same numbers, by the dtype of weights.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# And between a teacher and a student that attends to all its teacher does.
IDENTITY = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CACHE_LENGTHS = (1024, 8192, 65536)
# What counts as smaller: less than this part of what it was.
SMALLER = 0.9999


def check(name: str, error: float, limit: float) -> dict[str, Any]:
    """A named check with its outcome: passed where `error` is at most `limit`."""
    return {"name": name, "error": error, "limit": limit, "passed": error <= limit}


@torch.no_grad()
def start_checks(teacher: LanguageModel, student: LanguageModel, tokens: Tensor) -> list[dict[str, Any]]:
    """Whether an untrained student is its teacher as long as it sees all of `tokens: int64 [B,T]`."""
    near = tokens[:, : _identical_for(student)]
    if near.shape[1] < 2:
        return []
    expected, came = (model(near, all_logits=True)[0] for model in (teacher, student))
    error, dtype = relative_error(came, expected), student.embedding.weight.dtype
    return [check(f"at the start, the first {near.shape[1]} tokens are the teacher's", error, IDENTITY[dtype])]


@torch.no_grad()
def end_checks(student: LanguageModel, tokens: Tensor) -> list[dict[str, Any]]:
    """Whether a student, trained or not, computes the same in every form, in constant memory. `tokens: int64 [B,T]`."""
    error, dtype = _recurrence(student, tokens), student.embedding.weight.dtype
    found = [check("a prompt in pieces, then token by token, equals the whole", error, AGREEMENT[dtype])]
    if all(block.mixer.constant_state for block in student.blocks):  # type: ignore[union-attr]
        grown = student.state_bytes(CACHE_LENGTHS[-1]) - student.state_bytes(CACHE_LENGTHS[0])
        found.append(check("bytes the state grows between 1k and 64k tokens", float(grown), 0.0))
    return found


def gap_closed(start: dict[str, Any], end: dict[str, Any]) -> dict[str, float | None]:
    """For each text, the part of the gap in perplexity between start and teacher that training closed.

    The start is the better one of the whole student and of window and sinks alone. None where there is no gap.
    """
    closed: dict[str, float | None] = {}
    for name, text in start["texts"].items():
        before, after = text["perplexity"], end["texts"][name]["perplexity"]
        first = min(before["student"], before.get("student, memory off", before["student"]))
        gap = first - before["teacher"]
        closed[name] = (first - after["student"]) / gap if gap > 0 else None
    return closed


def goals(start: dict[str, Any], end: dict[str, Any], config: VerifyConfig) -> list[dict[str, Any]]:
    """The goals of training as checks, of two results of `Evaluator.measure`; none where `config.gap_closed` is 0."""
    if not config.gap_closed:
        return []
    pairs = zip(start["layer_errors"], end["layer_errors"], strict=True)
    worst = max((after / before for before, after in pairs if before > IDENTITY[torch.float32]), default=0.0)
    found = [check("a layer's error, at most, over what it was at the start", worst, SMALLER)]
    for name, closed in gap_closed(start, end).items():
        left = 0.0 if closed is None else 1 - closed
        found.append(check(f"{name}: part of the gap to the teacher that is left", left, 1 - config.gap_closed))
        perplexities = end["texts"][name]["perplexity"]
        if "student, memory off" in perplexities:
            ratio = perplexities["student"] / perplexities["student, memory off"]
            found.append(check(f"{name}: perplexity with the memory over that without", ratio, SMALLER))
    if "answer" in end:
        other = float(end["answer"]["tokens_alike"] == 0)
        found.append(check("answers that begin otherwise than the teacher's", other, 0.0))
    return found


def check_generation(rows: Sequence[dict[str, int]], *, constant: bool) -> list[dict[str, Any]]:
    """Whether the cache of `export.long_generation` kept its size; no check where it is not `constant`."""
    if not constant:
        return []
    grown = float(max(row["bytes"] for row in rows) - rows[0]["bytes"])
    return [check(f"bytes the cache grew by over {rows[-1]['tokens']} generated tokens", grown, 0.0)]


def _identical_for(student: LanguageModel) -> int:
    """Tokens for which every layer computes what its teacher's does; 0 where one never does."""
    return min((0 if _never_softmax(mixer) else mixer.config.window for mixer in converted_mixers(student)), default=0)


def _never_softmax(mixer: Converted) -> bool:
    """Whether it differs from softmax attention even where its window holds everything."""
    return isinstance(mixer, Liger) or (isinstance(mixer, LinearizedAttention) and mixer.config.combine == "norms")


def _recurrence(student: LanguageModel, tokens: Tensor) -> float:
    """Error of the last logits of a prompt given in two pieces and eight steps, against the whole at once."""
    tokens = tokens[:1, :200]
    length = tokens.shape[1]
    steps = min(8, length - 1)
    first = max((length - steps) * 2 // 3, 1)
    whole = student(tokens, all_logits=True)[0][:, -steps:]
    _, state = student(tokens[:, :first])
    if first < length - steps:
        _, state = student(tokens[:, first : length - steps], state=state)
    outs = []
    for step in range(length - steps, length):
        logits, state = student.step(tokens[:, step], state)
        outs.append(logits)
    return relative_error(torch.stack(outs, 1), whole)


def cache_bytes(teacher: LanguageModel, student: LanguageModel) -> list[dict[str, int]]:
    """Bytes of one sequence's cache in float32, by its length."""
    return [
        {"tokens": length, "teacher": teacher.state_bytes(length), "student": student.state_bytes(length)}
        for length in CACHE_LENGTHS
    ]
