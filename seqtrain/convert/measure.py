"""What a converted model is worth against its teacher: perplexity, divergence, recall, each layer's error, ablations.

All logits of a text never exist at one time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from seqtrain.convert.texts import Text
from seqtrain.mixers.common.liger import Liger, LigerConfig
from seqtrain.mixers.linearized_attention import LinearizedAttention
from seqtrain.mixers.streaming_attention import StreamingAttention
from seqtrain.models import LanguageModel, generate
from seqtrain.testing import relative_error

Part = Literal["memory", "window"]
PARTS: tuple[Part, ...] = ("memory", "window")
# Tokens whose logits exist at one time.
CHUNK = 256
# The largest logarithm of a perplexity that is written: beyond it a float overflows.
LARGEST = 700.0
# Tokens of the answer to the prompt.
ANSWER = 8
# Tokens of a passage that is repeated, and texts it is put into.
PASSAGE, PASSAGES = 16, 2

Converted = Liger | LinearizedAttention | StreamingAttention


class Reach(NamedTuple):
    """What the softmax of a layer attends to: the last `window` tokens and a document's first `sinks`."""

    window: int
    sinks: int


def converted_mixers(model: LanguageModel) -> list[Converted]:
    """The mixers that replaced attention."""
    return [block.mixer for block in model.blocks if isinstance(block.mixer, Converted)]


def softmax_reach(model: LanguageModel) -> Reach:
    """The widest reach of the converted layers' softmax."""
    configs = [mixer.config for mixer in converted_mixers(model)]
    sinks = [config.sinks for config in configs if not isinstance(config, LigerConfig)]
    return Reach(max((config.window for config in configs), default=0), max(sinks, default=0))


@contextmanager
def switched_off(model: LanguageModel, part: Part) -> Iterator[bool]:
    """`model` without the `memory` or the `window` of its converted layers; yields whether it has both."""
    mixers = converted_mixers(model)
    holders: dict[Part, list[Converted]] = {
        "memory": [mixer for mixer in mixers if not isinstance(mixer, StreamingAttention)],
        "window": [mixer for mixer in mixers if mixer.config.window],
    }
    found = holders[part] if all(holders.values()) else []
    for mixer in found:
        mixer.without = part
    try:
        yield bool(found)
    finally:
        for mixer in found:
            mixer.without = ""


@torch.no_grad()
def hidden_states(model: LanguageModel, tokens: Tensor) -> Tensor:
    """What the head is given for `tokens: int64 [B,T]`, a row at a time: `[B,T,D]`."""
    return torch.cat([model.hidden(row, keep_state=False)[0] for row in tokens.split(1)])


@torch.no_grad()
def surprise(model: LanguageModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """`-log p` of every token but the first given those before it, float64 `[B,T-1]`."""
    chunks = [
        log_p.gather(-1, part[..., None])[..., 0]
        for log_p, part in zip(_log_p(model, hidden[:, :-1]), tokens[:, 1:].split(CHUNK, 1), strict=True)
    ]
    return -torch.cat(chunks, 1).double()


@torch.no_grad()
def agreement(teacher: LanguageModel, expected: Tensor, student: LanguageModel, came: Tensor) -> tuple[float, float]:
    """Mean `KL(teacher | student)` in nats per token, and how often the likeliest token agrees, of `[B,T,D]`."""
    divergence, same = [], []
    for log_p, log_q in zip(_log_p(teacher, expected), _log_p(student, came), strict=True):
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
    return float(torch.cat(divergence, 1).mean()), float(torch.cat(same, 1).mean())


def _log_p(model: LanguageModel, hidden: Tensor) -> Iterator[Tensor]:
    """Logarithms of next tokens' probabilities, float32 `[B,<=CHUNK,vocab]` one after the other."""
    return (model.head(part).log_softmax(-1) for part in hidden.split(CHUNK, 1))


def perplexity(surprises: Tensor) -> float:
    """Of tokens with these surprises, in nats."""
    return math.exp(min(float(surprises.mean()), LARGEST))


def by_position(surprises: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Perplexity of each model between positions that double: `{"from": 64, "to": 128, "teacher": ..., ...}`.

    `surprises`: `[B,T-1]` by the model's name, the first of token 1.
    """
    length, rows, start = next(iter(surprises.values())).shape[1] + 1, [], 1
    while start < length:
        end = min(length, 64 if start == 1 else 2 * start)
        found = {name: perplexity(each[:, start - 1 : end - 1]) for name, each in surprises.items()}
        rows.append({"from": start, "to": end, **found})
        start = end
    return rows


def repeated_passages(tokens: Tensor, passage: int, first: int, least_between: int) -> Tensor | None:
    """`tokens: [B,T]` with one random passage of its own tokens at `first` and again at the end; None if too short.

    `passage`: its length. `least_between`: the least distance between its two occurrences.
    """
    length = tokens.shape[1]
    if length - passage - first < least_between:
        return None
    # Of tokens that the model knows, in an unpredictable order.
    known = tokens.unique()
    drawn = torch.randint(len(known), (tokens.shape[0], passage), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, first : first + passage] = changed[:, length - passage :] = known[drawn]
    return changed


def recall(model: LanguageModel, tokens: Tensor, answers: int) -> dict[str, float]:
    """How well the last `answers` tokens of each row are predicted: mean surprise in nats, top-1 accuracy."""
    hidden = hidden_states(model, tokens)
    best = torch.cat([log_p.argmax(-1) for log_p in _log_p(model, hidden[:, -answers - 1 : -1])], 1)
    right = (best == tokens[:, -answers:]).double().mean()
    return {"surprise": float(surprise(model, hidden, tokens)[:, -answers:].mean()), "accuracy": float(right)}


class Evaluator:
    """Measures students against a teacher, whose own results are computed once."""

    def __init__(self, teacher: LanguageModel, texts: Sequence[Text], *, tokenizer: Any = None, prompt: str = ""):
        """`tokenizer`: of Hugging Face, for the `prompt` both continue; without either there is no answer."""
        self.teacher = teacher
        self.texts = texts
        self.tokenizer = tokenizer
        self.prompt = prompt if tokenizer is not None else ""
        self._hidden = {text.name: hidden_states(teacher, text.tokens) for text in texts}
        self._surprise = {text.name: surprise(teacher, self._hidden[text.name], text.tokens) for text in texts}
        self._answer = self._continued(teacher)

    def measure(self, student: LanguageModel) -> dict[str, Any]:
        """Layer errors, and for each text perplexity with all parts and without, divergence, agreement; recall."""
        found: dict[str, Any] = {
            "layer_errors": layer_errors(self.teacher, student, self.texts[0].tokens[:1]),
            "texts": {text.name: self._compared(student, text) for text in self.texts},
            "recall": self._recall(student),
        }
        if self.prompt:
            found["answer"] = self._answered(student)
        return found

    def _compared(self, student: LanguageModel, text: Text) -> dict[str, Any]:
        tokens, expected = text.tokens, self._hidden[text.name]
        came = hidden_states(student, tokens)
        divergence, same = agreement(self.teacher, expected, student, came)
        by_model = {"teacher": self._surprise[text.name], "student": surprise(student, came, tokens)}
        for part in PARTS:
            with switched_off(student, part) as found:
                if found:
                    by_model[f"student, {part} off"] = surprise(student, hidden_states(student, tokens), tokens)
        return {
            "tokens": tokens.numel(),
            "perplexity": {name: perplexity(each) for name, each in by_model.items()},
            "kl_to_teacher": divergence,
            "top1_agreement": same,
            "by_position": by_position(by_model),
        }

    def _recall(self, student: LanguageModel) -> dict[str, Any] | None:
        """How well a passage of random tokens is predicted when it is repeated beyond every layer's window."""
        reach = softmax_reach(student)
        rows = self.texts[0].tokens[:PASSAGES]
        tokens = repeated_passages(rows, PASSAGE, first=reach.sinks, least_between=reach.window + PASSAGE)
        if tokens is None:
            return None
        # Nothing predicts the first token of a passage.
        answers = PASSAGE - 1
        found: dict[str, Any] = {"tokens_between": tokens.shape[1] - PASSAGE - reach.sinks}
        found |= {"teacher": recall(self.teacher, tokens, answers), "student": recall(student, tokens, answers)}
        for part in PARTS:
            with switched_off(student, part) as has_both:
                if has_both:
                    found[f"student, {part} off"] = recall(student, tokens, answers)
        return found

    def _continued(self, model: LanguageModel) -> list[int]:
        if not self.prompt:
            return []
        prompt = torch.tensor([self.tokenizer(self.prompt)["input_ids"]], dtype=torch.int64)
        return generate(model, prompt, max_new_tokens=ANSWER, temperature=0.0)[0].tolist()

    def _answered(self, student: LanguageModel) -> dict[str, Any]:
        answer = self._continued(student)
        differing = [a != b for a, b in zip(answer, self._answer, strict=True)]
        return {
            "prompt": self.prompt,
            "teacher": self.tokenizer.decode(self._answer),
            "student": self.tokenizer.decode(answer),
            "tokens_alike": differing.index(True) if any(differing) else len(differing),
        }


@torch.no_grad()
def layer_errors(teacher: LanguageModel, student: LanguageModel, tokens: Tensor) -> list[float]:
    """The error of each layer's mixer on its teacher's input for `tokens: int64 [B,T]`.

    `|student - teacher| / |teacher|` in Frobenius norms over all tokens; 0 for a layer that is its teacher's.
    """
    x, errors = teacher.embedding(tokens), []
    layers: Any = zip(teacher.blocks, student.blocks, strict=True)
    for theirs, mine in layers:
        expected, _ = theirs.mixer(theirs.mixer_norm(x))
        came, _ = mine.mixer(mine.mixer_norm(x))
        errors.append(relative_error(came, expected))
        x = x + expected
        x = x + theirs.mlp(theirs.mlp_norm(x))
    return errors
