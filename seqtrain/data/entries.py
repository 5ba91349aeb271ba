"""What `data.sources` says: the sources of a mixture, each with settings as if it were the only one."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from seqtrain.data.config import DataConfig
from seqtrain.data.shares import Weight, weight_at
from seqtrain.data.sources import SOURCES
from seqtrain.data.synthetic import TASKS
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.validation import validate

# Keys of `data` that an entry may have for itself.
OWN = (
    *("held_out", "held_out_path", "held_out_rows", "text_field", "invalid_utf8"),
    *("train_roles", "chat_template", "packing", "documents_per_row"),
)
# Keys of `data` of which a mixture has those of its entries.
SINGLE: Mapping[str, Any] = {"path": "", "held_out_path": "", "task": {}}


@dataclass(frozen=True)
class Entry:
    """One source of a mixture. `config`: the settings of a corpus of it alone."""

    name: str
    weight: Weight
    config: DataConfig


def entries(config: DataConfig) -> list[Entry]:
    """The sources of the mixture that `config` describes. Raises `ConfigError` for the first that is wrong."""
    for key, empty in SINGLE.items():
        if getattr(config, key) != empty:
            raise ConfigError(f"data.{key}={getattr(config, key)}: data.sources is given; write it into its entries")
    kinds = [_kind(entry, f"data.sources.{number}") for number, entry in enumerate(config.sources)]
    found: list[Entry] = []
    for number, (entry, kind) in enumerate(zip(config.sources, kinds, strict=True)):
        key = f"data.sources.{number}"
        name = _name(entry, kind if kinds.count(kind) == 1 else f"{kind}_{number}", key)
        if name in [other.name for other in found]:
            raise ConfigError(f"{key}.name={name}: another entry has this name; choose one for each")
        found.append(Entry(name, _weight(entry.get("weight", 1.0), f"{key}.weight"), _alone(config, entry, kind, key)))
    for step in sorted({step for entry in found for step, _ in entry.weight}):
        if not any(weight_at(entry.weight, step) for entry in found):
            raise ConfigError(f"data.sources: at step {step} the weights of all are 0; give one more")
    return found


def without_places(sources: Any) -> Any:
    """`data.sources`, as a config holds them, without where text lies, and by their numbers; anything else as it is."""
    if not (isinstance(sources, list) and sources and all(isinstance(entry, dict) for entry in sources)):
        return sources
    places = (*SOURCES.names, "held_out_path")
    return {
        str(number): {key: None if key in places else value for key, value in entry.items()}
        for number, entry in enumerate(sources)
    }


def _kind(entry: Mapping[str, Any], key: str) -> str:
    known = [*SOURCES.names, *TASKS.names]
    kinds = [name for name in entry if name in known]
    for name in entry:
        if name not in (*known, "name", "weight", *OWN):
            options = [*known, "name", "weight", *OWN]
            raise ConfigError(unknown_name("config key", f"{key}.{name}", [f"{key}.{each}" for each in options]))
    if len(kinds) != 1:
        came = " and ".join(kinds) or "none"
        raise ConfigError(f"{key}: names {came}; an entry has one kind of source, as in {{text: PATH, weight: 0.5}}")
    return kinds[0]


def _name(entry: Mapping[str, Any], default: str, key: str) -> str:
    name = entry.get("name", default)
    if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        raise ConfigError(f"{key}.name={name}: must be letters, digits and any of . _ -; it is part of keys of metrics")
    return name


def _weight(value: Any, key: str) -> Weight:
    points = list(_points(value, key))
    steps = [step for step, _ in points]
    if steps != sorted(set(steps)):
        raise ConfigError(f"{key}={value}: steps must rise")
    if not any(weight for _, weight in points):
        raise ConfigError(f"{key}={value}: must be above 0; leave out an entry that is not to be read")
    return points


def _points(value: Any, key: str) -> Iterator[tuple[int, float]]:
    """`(step, weight)` of a weight that is a number, or a list of such pairs."""
    pairs = value if isinstance(value, list) else [[0, value]]
    for pair in pairs or [None]:
        match pair:
            case [int(step), int(weight) | float(weight)] if step >= 0 and weight >= 0 and bool not in map(type, pair):
                yield step, weight
            case _:
                raise ConfigError(
                    f"{key}={value}: must be a number above 0, or a list of steps and weights such as "
                    "[[0, 0.7], [10000, 0.3]]"
                )


def _alone(config: DataConfig, entry: Mapping[str, Any], kind: str, key: str) -> DataConfig:
    """The settings of a corpus of this entry alone."""
    what = entry[kind]
    empty = what in (None, "", {})
    own = {name: entry[name] for name in OWN if name in entry}
    if kind in TASKS.names:
        if not (empty or isinstance(what, Mapping)):
            raise ConfigError(f"{key}.{kind}={what}: must hold the fields of data.task, as in {{{kind}: {{}}}}")
        # Its rows are full.
        own |= {"task": dict(what or {}), "packing": "stream", "documents_per_row": 0}
    elif not (empty or isinstance(what, str)):
        raise ConfigError(f"{key}.{kind}={what}: must be a file, a folder or a pattern")
    else:
        own["path"] = what or ""
    checked = vars(validate(DataConfig, own, prefix=f"{key}."))
    return replace(config, source=kind, sources=(), **{name: checked[name] for name in own})
