"""Continuing a prompt: the prompt in one forward pass, then one token at a time from the state."""

from collections.abc import Callable

import torch
from torch import Tensor

from seqtrain.mixers import WHOLE
from seqtrain.models.language_model import LanguageModel
from seqtrain.parallel.sequence import SequenceContext


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda token: token,
    sequence: SequenceContext = WHOLE,
) -> Tensor:
    """`prompt: int64 [B,T]`, T >= 1, rows of equal length -> the new tokens, int64 `[B, at most max_new_tokens]`.

    `temperature`: logits are divided by it; 0 takes the likeliest token. `top_k`: only so many likeliest tokens may be
    drawn; 0: all. `top_p`: only the likeliest whose probabilities together reach it; 1: all. `generator`: on the
    model's device. `stop`: a token that ends its row; the row is filled up with it, and when every row has ended, so
    does the work. `agree`: gives for the tokens drawn, `[B]`, those that are taken: ranks that hold a model together
    must go on with the same. The state does not grow with the tokens where all mixers' states are constant. Raises
    `ValueError`.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"generate: prompt has shape {tuple(prompt.shape)}, expected [B, T] with T >= 1")
    if not bool(((prompt >= 0) & (prompt < model.vocab_size)).all()):
        came = f"prompt holds ids from {int(prompt.min())} to {int(prompt.max())}"
        raise ValueError(f"generate: {came}, expected 0 to {model.vocab_size - 1}, as the model has embeddings")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        came = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise ValueError(f"generate: {came}; expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
    new: list[Tensor] = []
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    logits, state = model(prompt, sequence=sequence)
    for index in range(max_new_tokens):
        token = agree(choose_token(logits, temperature, top_k, top_p, generator))
        if stop is not None:
            token = token.where(~ended, stop)
            ended |= token == stop
        new.append(token)
        if index + 1 == max_new_tokens or bool(ended.all()):
            break
        logits, state = model.step(token, state, sequence=sequence)
    return torch.stack(new, 1) if new else prompt[:, :0]


def choose_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draws from `logits: [B,vocab]` as `generate` says: int64 `[B]`."""
    if temperature == 0:
        return logits.argmax(-1)
    probability, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    # What the tokens before it reach decides: the one that crosses top_p still belongs.
    kept = probability.cumsum(-1) - probability < top_p
    if top_k:
        kept &= rank < top_k
    drawn = torch.multinomial(probability * kept, 1, generator=generator)
    return token.gather(-1, drawn)[:, 0]
