"""The held-out texts a converted model is compared with its teacher on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.settings import VerifyConfig
from seqtrain.convert.sources import Source
from seqtrain.errors import ConfigError


@dataclass(frozen=True)
class Text:
    """`name`: what the report calls it. `origin`: where it is from, without a path. `tokens`: int64 `[B,T]`."""

    name: str
    origin: str
    tokens: Tensor


def _code() -> str:
    # `data=stdlib` holds this file out of what it trains on.
    return Path(str(import_module("multiprocessing.connection").__file__)).read_text(encoding="utf-8")


def _prose() -> str:
    topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    return "\n".join(topics.values())


# What comes with Python: its help pages, and a module of its library.
BUILT_IN: Mapping[str, Callable[[], str]] = {"python-code": _code, "python-prose": _prose}


def read_texts(config: VerifyConfig, source: Source, *, seed: int) -> list[Text]:
    """Those of `config.texts` as the source's tokenizer reads them; random tokens where it has none.

    Rows follow one another from the beginning of a text, as many as it has up to `config.sequences`. Raises
    `ConfigError`.
    """
    tokenizer = source.tokenizer()
    wanted = {name: origin for name, origin in config.texts.items() if origin}
    if tokenizer is not None and wanted:
        return [_tokenized(name, origin, config, tokenizer) for name, origin in wanted.items()]
    if files := [f"verify.texts.{name}={origin}" for name, origin in wanted.items() if origin not in BUILT_IN]:
        raise ConfigError(f"{files[0]}: source={source.path} has no tokenizer to read it with")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(source.config.vocab_size, (config.sequences, config.tokens), generator=generator)
    return [Text("random", "random tokens", tokens)]


def _tokenized(name: str, origin: str, config: VerifyConfig, tokenizer: Any) -> Text:
    key = f"verify.texts.{name}={origin}"
    if origin in BUILT_IN:
        content = BUILT_IN[origin]()
    else:
        try:
            content = Path(origin).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{key}: no such file; give one, or {' or '.join(BUILT_IN)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}: can't be read as UTF-8 text: {error}") from None
    # Twelve characters are more than a token has on average: a long text need not be read to its end.
    content = content[: 12 * config.tokens * config.sequences]
    ids = torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    rows = min(len(ids) // config.tokens, config.sequences)
    if rows == 0:
        raise ConfigError(f"{key}: has {len(ids)} tokens, verify.tokens={config.tokens}; use fewer, or a longer text")
    return Text(name, Path(origin).name, ids[: rows * config.tokens].view(rows, config.tokens))
