"""Continues a prompt with the newest checkpoint of a run.

python launch/generate.py run=runs/mine
python launch/generate.py run=runs/mine prompt="Once upon a time" tokens=500
python launch/generate.py run=runs/mine prompt="def main(" temperature=0 seed=1
python launch/generate.py run=converted prompt="What is the capital of France?"

A folder of `seqtrain convert`, or an exported model, is one, too; where its tokenizer has a chat template, the prompt
is a user's turn, and the answer is printed alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from torch import Tensor

from seqtrain.config import launch
from seqtrain.data import Tokenizer
from seqtrain.errors import ConfigError
from seqtrain.models import LanguageModel, generate
from seqtrain.models.quantized import quantize
from seqtrain.models.rounded_states import EXACT, GenerationConfig
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.loading import load
from seqtrain.validation import FilePath, validate


@dataclass(frozen=True)
class Continuation:
    """How a prompt is continued."""

    # Text the model continues.
    prompt: str
    # Most tokens to generate; the text ends earlier where the model ends its document.
    tokens: Annotated[int, Field(ge=0)]
    # The same seed draws the same text.
    seed: Annotated[int, Field(ge=0)]
    # Logits are divided by it; 0 takes the likeliest token each time.
    temperature: Annotated[float, Field(ge=0)] = 1.0
    # Only so many of the likeliest tokens may be drawn; 0: all.
    top_k: Annotated[int, Field(ge=0)] = 0
    # Only the likeliest tokens whose probabilities together reach it may be drawn; 1: all.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True)
class GenerateConfig(Continuation):
    """What `seqtrain generate` can be told."""

    prompt: str = "def "
    tokens: Annotated[int, Field(ge=0)] = 256
    seed: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 0.8
    # Whether the prompt is a user's turn in the tokenizer's chat template; auto: where a model that was converted or
    # exported has one.
    chat: Literal["auto", "always", "never"] = "auto"
    # output_dir of the run whose newest checkpoint writes, or of a conversion, or an exported model.
    run: FilePath = ""
    # Implementation of the operators.
    backend: Literal["auto", "reference", "chunked", "triton", "native"] = "auto"
    # What matrices are read as: integers of 8 or 4 bits, by torchao, decode faster, and round.
    weights: Literal["float32", "int8", "int4"] = "float32"
    generation: GenerationConfig = EXACT


def main(arguments: Sequence[str]) -> int:
    """Prints the text; gives the exit status."""
    return launch("generate", arguments, read, write)


def read(config: DictConfig) -> GenerateConfig:
    typed = validate(GenerateConfig, OmegaConf.to_container(config))  # type: ignore[arg-type]
    if not typed.run:
        raise ConfigError("run: is required; name the output_dir of a run")
    return typed


def write(config: GenerateConfig) -> int:
    """Prints the text."""
    loaded = load(config.run, key="run")
    model, tokenizer = loaded.model, loaded.tokenizer
    quantize(model, config.weights)
    template = getattr(tokenizer.described, "chat_template", None)
    if config.chat == "always" and not template:
        raise ConfigError(f"chat=always: the tokenizer of run={config.run} has no chat template; use chat=never")
    if template and (config.chat == "always" or (config.chat == "auto" and loaded.exported)):
        print(answer(model, tokenizer, config, backend=config.backend, generation=config.generation))
    else:
        print(continue_text(model, tokenizer, config, backend=config.backend, generation=config.generation))
    return 0


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    wish: Continuation,
    *,
    backend: str,
    generation: GenerationConfig = EXACT,
) -> str:
    """What `model` answers to the prompt, as a user's turn in the tokenizer's chat template."""
    turn = [{"role": "user", "content": wish.prompt}]
    text = tokenizer.described.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    [(ids, _)] = tokenizer.encode_marked([text])
    new = continue_ids(model, [int(each) for each in ids], wish, tokenizer.end, backend, config=generation)
    return tokenizer.decode([token for token in new if token != tokenizer.end])


def continue_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    wish: Continuation,
    *,
    backend: str,
    generation: GenerationConfig = EXACT,
) -> str:
    """The prompt and what `model` continues it with; the same for the same weights and seed."""
    prompt = prompt_ids(tokenizer, wish)
    return text_of(tokenizer, wish, continue_ids(model, prompt, wish, tokenizer.end, backend, config=generation))


def prompt_ids(tokenizer: Tokenizer, wish: Continuation) -> list[int]:
    """What `continue_ids` continues. Without a prompt, the end of a document: what follows is the start of another."""
    return tokenizer.encode(wish.prompt) or [tokenizer.end]


def text_of(tokenizer: Tokenizer, wish: Continuation, ids: list[int]) -> str:
    """The prompt and the text of what `continue_ids` gave."""
    return wish.prompt + tokenizer.decode([token for token in ids if token != tokenizer.end])


def continue_ids(
    model: LanguageModel,
    prompt: list[int],
    wish: Continuation,
    end: int,
    backend: str,
    *,
    agree: Callable[[Tensor], Tensor] = lambda token: token,
    config: GenerationConfig = EXACT,
) -> list[int]:
    """The tokens after `prompt`, up to that of the document's `end`. `agree`, `config`: as in `generate`."""
    if wish.tokens == 0:
        return []
    device = next(model.parameters()).device
    new = generate(
        model,
        torch.tensor([prompt], device=device),
        max_new_tokens=wish.tokens,
        temperature=wish.temperature,
        top_k=wish.top_k,
        top_p=wish.top_p,
        generator=torch.Generator(device).manual_seed(wish.seed),
        stop=end,
        agree=agree,
        sequence=SequenceContext(backend=backend),
        config=config,
    )
    return list(new[0].tolist())
