"""Continuing a prompt: the prompt in one forward pass, then one token at a time from the state."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from seqtrain.mixers import WHOLE, State
from seqtrain.models.huggingface_packing import Packing
from seqtrain.models.language_model import LanguageModel, States
from seqtrain.models.rounded_states import EXACT, GenerationConfig, RoundedStates
from seqtrain.parallel.sequence import SequenceContext

# Tokens of a prompt that are read at a time: their hidden states are what a long prompt would take memory for.
PREFILL = 8192


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda token: token,
    sequence: SequenceContext = WHOLE,
    config: GenerationConfig = EXACT,
) -> Tensor:
    """`prompt: int64 [B,T]`, T >= 1, or B rows `[T_b]` -> the new tokens, int64 `[B, at most max_new_tokens]`.

    `temperature`: logits are divided by it; 0 takes the likeliest token. `top_k`: only so many likeliest tokens may be
    drawn; 0: all. `top_p`: only the likeliest whose probabilities together reach it; 1: all. `generator`: on the
    model's device. `stop`: a token that ends its row; the row is filled up with it, costs nothing more once half of
    the rows have ended, and when every row has ended, so does the work. `agree`: gives for the tokens drawn, `[B]`,
    those that are taken: ranks that hold a model together must go on with the same. `config`: how many bits states have
    between steps. The state does not grow with the tokens where all mixers' states are constant. Raises `ValueError`.
    """
    rows = [prompt] if isinstance(prompt, Tensor) else list(prompt)
    for each in rows:
        _check_prompt(model, each, 2 if isinstance(prompt, Tensor) else 1)
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        came = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise ValueError(f"generate: {came}; expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
    ragged = not isinstance(prompt, Tensor)
    logits: Tensor
    state: States
    if ragged:
        logits, state = _read_rows(model, rows, sequence)
        # Documents' states lie otherwise; they are rounded once they are rows'.
        state = RoundedStates.of(state, config) if config.state_bits else state
    else:
        empty = RoundedStates(len(model.blocks), config) if config.state_bits else None
        logits, state = _read(model, rows[0], sequence, empty)
    count, device = len(logits), logits.device
    new = torch.empty(count, max_new_tokens, dtype=torch.int64, device=device)
    if stop is not None:
        new.fill_(stop)
    # Rows that are gone on with, and which of those have ended.
    going, ended = torch.arange(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
    for index in range(max_new_tokens):
        token = agree(choose_token(logits, temperature, top_k, top_p, generator))
        if stop is not None:
            token = token.where(~ended, stop)
            ended |= token == stop
        new[going, index] = token
        if index + 1 == max_new_tokens or bool(ended.all()):
            return new[:, : index + 1]
        if stop is not None and 2 * int(ended.sum()) >= len(ended):
            kept = (~ended).nonzero()[:, 0]
            state = _chosen(state, kept)
            going, token, ended = going[kept], token[kept], ended[kept]
        if isinstance(state, RoundedStates):
            logits, state = state.step(model, token, sequence)
        else:
            logits, state = model.step(token, state, sequence=sequence)
    return new


def _chosen(state: States, rows: Tensor) -> States:
    """The states of some rows."""
    if isinstance(state, RoundedStates):
        return state.rows(rows)
    return [{name: x[rows] for name, x in layer.items()} for layer in state]


def _check_prompt(model: LanguageModel, prompt: Tensor, dims: int) -> None:
    """Raises `ValueError` for one that the model can't read."""
    if prompt.dim() != dims or prompt.shape[-1] == 0:
        expected = "[B, T]" if dims == 2 else "[T]"
        raise ValueError(f"generate: prompt has shape {tuple(prompt.shape)}, expected {expected} with T >= 1")
    if not bool(((prompt >= 0) & (prompt < model.vocab_size)).all()):
        came = f"prompt holds ids from {int(prompt.min())} to {int(prompt.max())}"
        raise ValueError(f"generate: {came}, expected 0 to {model.vocab_size - 1}, as the model has embeddings")


def _read(
    model: LanguageModel, prompt: Tensor, sequence: SequenceContext, state: States | None
) -> tuple[Tensor, States]:
    """The last token's logits `[B,vocab]` and the state after `prompt: [B,T]`, read in parts from `state`."""
    first, *others = prompt.split(PREFILL, 1)
    found: tuple[Tensor, States] = model(first, state=state, sequence=sequence)
    for part in others:
        found = model(part, state=found[1], sequence=sequence)
    return found


def _read_rows(
    model: LanguageModel, prompts: Sequence[Tensor], sequence: SequenceContext
) -> tuple[Tensor, list[State]]:
    """The same of rows of any lengths, as documents of one: no token is read that is none's."""
    lengths = torch.tensor([len(each) for each in prompts], device=prompts[0].device)
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    packing = Packing.of(real, torch.zeros_like(real))
    hidden, states = model.hidden(
        torch.cat(list(prompts))[None], sequence=replace(sequence, cu_seqlens=packing.boundaries)
    )
    return model.head(hidden[0, packing.boundaries[1:] - 1]), [packing.after(state) for state in states]


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
