"""Checks of a conversion: whether the forms of a student agree, and whether training reached its goals."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.measure import converted_mixers
from seqtrain.convert.settings import VerifyConfig
from seqtrain.mixers.common.liger import Liger
from seqtrain.mixers.linearized_attention import LinearizedAttention
from seqtrain.models import LanguageModel
from seqtrain.testing import relative_error

# Largest relative error between two ways to compute the same numbers, by the dtype of weights.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Between a model and what was exported of it.
RELOADED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# And between a teacher and a student that attends to all its teacher does.
IDENTITY = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CACHE_LENGTHS = (1024, 8192, 65536)
# What counts as smaller: less than this part of what it was.
SMALLER = 0.9999


def check(name: str, error: float, limit: float) -> dict[str, Any]:
    """A named check with its outcome: passed where `error` is at most `limit`."""
    return {"name": name, "error": error, "limit": limit, "passed": error <= limit}


@torch.no_grad()
def start_checks(
    teacher: LanguageModel, student: LanguageModel, tokens: Tensor, *, identical: bool = False
) -> list[dict[str, Any]]:
    """Whether an untrained student is its teacher as long as it sees all of `tokens: int64 [B,T]`.

    `identical`: every layer is the teacher's, of whatever type of model.
    """
    near = tokens if identical else tokens[:, : _identical_for(student)]
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
    if all(block.mixer.constant_state for block in student.blocks):
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


@torch.no_grad()
def check_reloaded(model: Any, tokens: Tensor, expected: Tensor) -> list[dict[str, Any]]:
    """Checks an exported `model` loaded again: logits on `tokens: [B,T]`, and generation with and without cache.

    `expected: [B,T,vocab]`: the student's logits before it was exported.
    """
    error = relative_error(model(tokens).logits, expected)
    reloaded = check("exported and loaded again", error, RELOADED[next(model.parameters()).dtype])
    prompt = tokens[:1, : min(tokens.shape[1], 100)]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    new = [model.generate(prompt, use_cache=cached, **options)[0] for cached in (True, False)]
    differing = float(sum(a != b for a, b in zip(*(row.tolist() for row in new), strict=False)))
    return [reloaded, check("tokens that differ when generated with and without the cache", differing, 0.0)]


@torch.no_grad()
def long_generation(model: Any, prompt: Tensor, new_tokens: int) -> list[dict[str, int]]:
    """Bytes of the cache while Hugging Face's `generate` continues `prompt: int64 [1,T]` greedily for `new_tokens`.

    A row `{"tokens": ..., "bytes": ...}` for the prompt, one whenever the tokens seen have doubled, one at the end.
    """
    from transformers import DynamicCache, StoppingCriteriaList

    from seqtrain.models.huggingface_cache import StateCache

    own = model.config.model_type == "seqtrain"
    cache: Any = StateCache(model.config.num_hidden_layers) if own else DynamicCache(config=model.config)
    rows: list[dict[str, int]] = []

    def watch(tokens: Tensor, scores: Tensor, **unused: Any) -> Tensor:
        # The token that was just chosen has not entered the cache yet.
        seen = tokens.shape[1] - 1
        if not rows or seen >= 2 * rows[-1]["tokens"] or seen == prompt.shape[1] + new_tokens - 1:
            rows.append({"tokens": seen, "bytes": cache.nbytes if own else bytes_held(cache)})
        return torch.zeros(len(tokens), dtype=torch.bool)

    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    return rows


def bytes_held(cache: Any) -> int:
    """Of the tensors in the layers of transformers' own cache."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                yield from tensors(each)

    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors(vars(layer)))


def check_generation(rows: Sequence[dict[str, int]], *, constant: bool) -> list[dict[str, Any]]:
    """Whether the cache of `long_generation` kept its size; no check where it is not `constant`."""
    if not constant:
        return []
    grown = float(max(row["bytes"] for row in rows) - rows[0]["bytes"])
    return [check(f"bytes the cache grew by over {rows[-1]['tokens']} generated tokens", grown, 0.0)]


def _identical_for(student: LanguageModel) -> int:
    """Tokens for which every layer computes what its teacher's does; 0 where one never does."""
    mixers = converted_mixers(student)
    normed = [mixer for mixer in mixers if isinstance(mixer, LinearizedAttention) and mixer.config.combine == "norms"]
    # They differ from softmax attention even where a window holds everything.
    if normed or any(isinstance(mixer, Liger) for mixer in mixers):
        return 0
    return min((mixer.config.window for mixer in mixers), default=0)


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
