"""How well models foretell tokens: perplexity, divergence and recall, without ever holding all logits of a text."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from seqtrain.models import LanguageModel

# Tokens whose logits exist at one time.
CHUNK = 256
# The largest logarithm of a perplexity that is written: beyond it a float has none.
LARGEST = 700.0


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
    """Mean `KL(teacher | student)` in nats a token, and how often both have the same likeliest token, of `[B,T,D]`."""
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
    """`tokens: [B,T]` with the same random passage of its own tokens from `first` on and at the end; None if too short.

    `passage`: its tokens. `least_between`: how far apart its first tokens must be at least.
    """
    length = tokens.shape[1]
    if length - passage - first < least_between:
        return None
    # Of tokens that the model knows, in an order that nothing foretells.
    known = tokens.unique()
    drawn = torch.randint(len(known), (tokens.shape[0], passage), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, first : first + passage] = changed[:, length - passage :] = known[drawn]
    return changed


def recall(model: LanguageModel, tokens: Tensor, answers: int) -> dict[str, float]:
    """How well the last `answers` tokens of each row are foretold: mean surprise in nats, share of likeliest tokens."""
    hidden = hidden_states(model, tokens)
    best = torch.cat([log_p.argmax(-1) for log_p in _log_p(model, hidden[:, -answers - 1 : -1])], 1)
    right = (best == tokens[:, -answers:]).double().mean()
    return {"surprise": float(surprise(model, hidden, tokens)[:, -answers:].mean()), "accuracy": float(right)}
