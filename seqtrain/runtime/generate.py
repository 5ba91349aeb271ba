"""Continues a prompt with the newest checkpoint of a run.

python launch/generate.py run=runs/mine
python launch/generate.py run=runs/mine prompt="Once upon a time" tokens=500
python launch/generate.py run=runs/mine prompt="def main(" temperature=0 seed=1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from seqtrain.config import launch
from seqtrain.errors import ConfigError
from seqtrain.runtime.sample import Continuation, continue_text, open_run
from seqtrain.validation import FilePath, validate


@dataclass(frozen=True)
class GenerateConfig(Continuation):
    """What `seqtrain generate` can be told."""

    prompt: str = "def "
    tokens: Annotated[int, Field(ge=0)] = 256
    seed: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 0.8
    # output_dir of the run whose newest checkpoint writes.
    run: FilePath = ""
    # Implementation of the operators.
    backend: Literal["auto", "reference", "chunked", "triton", "native"] = "auto"


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
    _, model, tokenizer = open_run(Path(config.run))
    print(continue_text(model, tokenizer, config, backend=config.backend))
    return 0
