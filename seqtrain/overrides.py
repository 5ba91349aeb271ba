"""Words `key=value` of the command line, put so that Hydra's grammar takes text as it was typed."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from seqtrain.errors import ConfigError


def quote_text(words: Sequence[str], types: Mapping[str, str], *, sweep: bool = False) -> list[str]:
    """`words` with quotes around every value that is text, and around any other that Hydra can't parse.

    `types`: what each key takes: `text`, which may be anything, a `list`, a `choice` or several, or another value.
    `sweep`: whether `key=a,b` asks for two runs. Raises `ConfigError` with the word to type instead where it isn't
    clear what is meant.
    """
    return [_quoted(word, types, sweep) for word in words]


def take(words: Sequence[str], key: str) -> tuple[str | None, list[str]]:
    """The text that `words` give `key`, or None, and the other words."""
    own = [word for word in words if word.startswith(f"{key}=")]
    parsed = _parse(own[-1]) if own else None
    return str(parsed.value()) if parsed else None, [word for word in words if word not in own]


def points(words: Sequence[str]) -> list[Sequence[str]]:
    """The override lists of the points of a sweep."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    return [point for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for point in batch]


def _quoted(word: str, types: Mapping[str, str], sweep: bool) -> str:
    key, sign, value = word.partition("=")
    if not (key if sign else word.startswith("~")):
        raise ConfigError(f"{word!r} is not key=value; --help lists the keys")
    kind, parsed = types.get(key.lstrip("+"), ""), _parse(word)
    if kind == "choice" and not value.startswith("["):
        kind = "text"
    if parsed and (not sign or _is_quoted(value) or (sweep and parsed.is_sweep_override())):
        return word
    if kind == "text" and sweep and "," in value:
        return f"{key}={','.join(map(_quote, value.split(',')))}"
    if kind == "text" or (not parsed and value[:1] not in ("[", "{")):
        return f"{key}={_quote(value)}"
    if parsed and not parsed.is_sweep_override():
        return word
    raise ConfigError(f"{word}: {_advice(key, value, kind)}")


def _advice(key: str, value: str, kind: str) -> str:
    if value[:1] in ("[", "{"):
        mended = next((each for each in _with_quoted_parts(value) if _parse(f"{key}={each}")), None)
        return f"type {shlex.quote(f'{key}={mended}')}" if mended else "brackets or quotes don't match"
    if kind == "list":
        return f"type {shlex.quote(f'{key}=[{value}]')}"
    return f"takes one value; type --multirun {shlex.quote(f'{key}={value}')} for one run after another"


def _with_quoted_parts(value: str) -> Iterator[str]:
    """A list or mapping with quotes around the parts that need them; with a bracket more where that is missing."""
    # Every second part is what separates the others.
    parts = re.split(r"([\[\]{},]|(?<=\w):\s)", value)
    parts[::2] = (part if _parse(f"k=[{part}]") else _quote(part.strip()) for part in parts[::2])
    mended = "".join(parts)
    yield from (mended, mended + "]", mended + "}")


def _parse(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _quote(text: str) -> str:
    return str(QuotedString(text=text, quote=Quote.double).with_quotes())
