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
from pathlib import Path
from typing import Annotated, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from torch import Tensor

from seqtrain.config import launch, read_run_config
from seqtrain.data import Tokenizer, load_tokenizer
from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import in_store, place
from seqtrain.models import LanguageModel, generate
from seqtrain.models.quantized import quantize
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.checks import check_store
from seqtrain.runtime.resolving import typed_pretrain_config
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.source import build_model, first_weights, frozen_weights
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
    path = place_of_run(config.run)
    exported = not (path / "config.yaml").is_file() and any(
        (place / "config.json").is_file() for place in (path, path / "model")
    )
    if exported:
        # It opens runs by what is here.
        from seqtrain.runtime.loading import load

        loaded = load(config.run)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        _, model, tokenizer = open_run(path)
    quantize(model, config.weights)
    template = getattr(tokenizer.described, "chat_template", None)
    if config.chat == "always" and not template:
        raise ConfigError(f"chat=always: the tokenizer of run={config.run} has no chat template; use chat=never")
    if template and (config.chat == "always" or (config.chat == "auto" and exported)):
        print(answer(model, tokenizer, config, backend=config.backend))
    else:
        print(continue_text(model, tokenizer, config, backend=config.backend))
    return 0


def answer(model: LanguageModel, tokenizer: Tokenizer, wish: Continuation, *, backend: str) -> str:
    """What `model` answers to the prompt, as a user's turn in the tokenizer's chat template."""
    turn = [{"role": "user", "content": wish.prompt}]
    text = tokenizer.described.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    [(ids, _)] = tokenizer.encode_marked([text])
    new = continue_ids(model, [int(each) for each in ids], wish, tokenizer.end, backend)
    return tokenizer.decode([token for token in new if token != tokenizer.end])


def open_run(path: Path) -> tuple[PretrainConfig, LanguageModel, Tokenizer]:
    """The config, the model with the newest checkpoint's weights, and the tokenizer of the run in folder `path`.

    Raises `ConfigError` where there is no run, `CheckpointError` where it has no whole checkpoint.
    """
    values = read_run_config(path)
    try:
        config = typed_pretrain_config(values)
    except ConfigError as error:
        raise ConfigError(f"run={path}: config.yaml is damaged: {error}") from error
    folder = finished_folder(path, config.checkpoint.store)
    tokenizer, built = load_tokenizer(config.data), []

    def load(newest: checkpoints.Checkpoint) -> None:
        _check_tokenizer(newest, config, tokenizer)
        built.append(_with_weights(newest, config, tokenizer))

    if checkpoints.find(folder.checkpoints, load) is None:
        raise CheckpointError(f"{folder.checkpoints}: holds no whole checkpoint")
    return config, built[0].eval(), tokenizer


def finished_folder(path: Path, store: str) -> RunFolder:
    """Of a run that `path` has, or copies of its records, beside which the checkpoints are, or which are in `store`."""
    beside = not isinstance(path, Path) or (path / "checkpoints").exists()
    if store and not beside:
        check_store(store, read=True)
    return RunFolder(path, "" if beside else store)


def place_of_run(name: str) -> Path:
    """The folder of a run, or where a store has copies of one. Raises `ConfigError` for a store that can't be read."""
    if in_store(name):
        check_store(name, name="run", read=True)
    return place(name)


def _check_tokenizer(newest: checkpoints.Checkpoint, config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Raises `CheckpointError` for another one than it was trained with."""
    made_with = newest.manifest.trajectory.get("data", {}).get("content", {}).get("tokenizer", tokenizer.identity)
    if made_with != tokenizer.identity:
        raise CheckpointError(
            f"{newest.folder}: was trained with another tokenizer than data.tokenizer={config.data.tokenizer} is now "
            f"({made_with[:12]}, now {tokenizer.identity[:12]}); put the old one back"
        )


def _with_weights(newest: checkpoints.Checkpoint, config: PretrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    model = build_model(config, tokenizer.vocab_size)
    if frozen := frozen_weights(config, model):
        others = first_weights(config, model, sha256=newest.manifest.trajectory["lora"]["source_sha256"])
    else:
        others = model.initial_weights(config.seed)
    newest.load_weights(model, frozen=frozen, others=others)
    return model


def continue_text(model: LanguageModel, tokenizer: Tokenizer, wish: Continuation, *, backend: str) -> str:
    """The prompt and what `model` continues it with; the same for the same weights and seed."""
    return text_of(tokenizer, wish, continue_ids(model, prompt_ids(tokenizer, wish), wish, tokenizer.end, backend))


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
) -> list[int]:
    """The tokens after `prompt`, up to that of the document's `end`. `agree`: as in `generate`."""
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
    )
    return list(new[0].tolist())
