"""From YAML and overrides to typed, checked dataclasses; every mistake becomes one line before anything starts.

Hydra composes what the dataclasses of a program say by default, the choices in conf/ and the overrides; pydantic checks
the result against the dataclasses. Their defaults are read from their source (`seqtrain.schema`), not imported.
"""

import argparse
import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from seqtrain.errors import ConfigError, exit_status, unknown_name
from seqtrain.files import make_new_folder, read_record
from seqtrain.help import commented, keep_composed, meanings
from seqtrain.overrides import points, quote_text, take
from seqtrain.schema import NAMED_GROUPS, PROGRAMS, conf_dir, definition, mixer_definition, mixer_names, named_options
from seqtrain.validation import expand, validate

T = TypeVar("T")


def _installed(package: str) -> str:
    """`${installed:torch}` in a YAML: the folder of an installed package, which is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"the package {package} is not installed")
    return str(Path(found.origin).parent)


OmegaConf.register_new_resolver("installed", _installed, replace=True)


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed config `name` with `overrides`, not to be changed. Raises `ConfigError` with one line.

    `run=FOLDER` among the overrides of `pretrain`: the config of the run in FOLDER, with what the others change.
    """
    run, words = take(quote_text(_without_null(overrides), _value_types(name)), "run" if name == "pretrain" else "")
    if name != "convert":
        words = _with_source(words)
    config = _composed(name, tuple(words), conf_dir())
    return config if run is None else _of_run(Path(expand(run)), config, words)


def _with_source(words: Sequence[str]) -> list[str]:
    """`words` with what fits a pretrained model where `source=` names one, which brings its own network."""
    given = {word.partition("=")[0].lstrip("+"): word for word in words}
    if given.get("source", "source=") in ("source=", "source=''", 'source=""'):
        return list(words)
    for key in given:
        if (key == "model" and given[key].partition("=")[2].strip("'\"") != "pretrained") or key.startswith("mixer."):
            raise ConfigError(f"{key}: source= brings a network of its own; leave out one of them")
    return [*words, "model=pretrained"]


def _value_types(name: str) -> dict[str, str]:
    """What each key and group of the primary config `name` takes, as `Definition.value_types` says."""
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir()]
    return dict.fromkeys([*groups, *NAMED_GROUPS], "choice") | {"run": "text"} | _key_types(name)


@cache
def _key_types(name: str) -> dict[str, str]:
    if name not in PROGRAMS:
        return {}
    target, key = PROGRAMS[name]
    own = dict(definition(target).value_types(f"{key}." if key else ""))
    return _key_types("pretrain") | own if key else own


def _of_run(folder: Path, config: DictConfig, words: Sequence[str]) -> DictConfig:
    """The config of the run in `folder`, changed where `config`, composed of `words`, differs from none or is typed."""
    stored = read_run_config(folder)
    typed = {word.partition("=")[0].lstrip("+") for word in words}
    plain = dict(_leaves(_composed("pretrain", (), conf_dir())))
    # The time is in the name of the folder where none is typed.
    plain["output_dir"] = config.output_dir
    changed = {key: value for key, value in _leaves(config) if key in typed or value != plain[key]}
    merged = OmegaConf.create(_as_text(stored))
    for key, value in {"output_dir": str(folder), **changed}.items():
        OmegaConf.update(merged, key, _as_text(value), force_add=True)
    return merged


def _as_text(values: Any) -> Any:
    """`values` so that what looks like an interpolation is the text that it is: a folder may come from anyone."""
    if isinstance(values, Container):
        values = OmegaConf.to_container(values, resolve=True)
    if isinstance(values, dict):
        return {key: _as_text(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_as_text(value) for value in values]
    # A backslash in front makes it text, as two make one of them.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def read_run_config(folder: Path, *, key: str = "run") -> dict[str, Any]:
    """The config that the run in `folder` keeps, which `key` named. Raises `ConfigError` where it can't be read."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{key}={folder}: holds no config.yaml; name the output_dir of a run")
    try:
        values = yaml.safe_load(read_record(file))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}={folder}: config.yaml is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{key}={folder}: config.yaml is damaged: holds no keys; put it back, or name another folder")
    return values


def _leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """The values by dotted key."""
    mixers = [f"mixer.{name}.{key}" for name, section in config.mixer.items() for key in section]
    for key in [*_key_types("pretrain"), *mixers]:
        if key not in ("mixer", "presets"):
            yield key, OmegaConf.select(config, key)


@lru_cache(maxsize=2)
def _composed(name: str, overrides: tuple[str, ...], folder: Path) -> DictConfig:
    _offer_defaults(folder)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose(name, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain_composition(error, name, overrides)) from error
    # Hydra does not tell those of a group of which several were chosen.
    several = [word.partition("=")[::2] for word in overrides if re.match(r"\w+=\[", word)]
    kinds = _value_types(name)
    choices = {
        **config.hydra.runtime.choices,
        **{group: value for group, value in several if kinds.get(group) == "choice"},
    }
    with open_dict(config):
        del config["hydra"]
    _note_presets(config, choices)
    if found := re.search(r"\$\{\s*oc\.env\b[^}]*\}?", json.dumps(OmegaConf.to_container(config), default=str)):
        raise ConfigError(
            f"{found[0]}: is not read, for it would stand in config.yaml; let the shell write what may be known, as in "
            "tracking.name=$NAME; keys of services are read from the environment by their own libraries"
        )
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_composition(error, name, overrides)) from error
    return config


# Hydra's store holds those of one folder: for another, or the same after another, they are stored again.
@lru_cache(maxsize=1)
def _offer_defaults(folder: Path) -> None:
    """Gives Hydra what the source says: defaults, `mixer=all`, options that are names, a stage, how long tasks train.

    `folder`: the configuration, whose files say more of some.
    """
    store = ConfigStore.instance()
    for name, (target, key) in PROGRAMS.items():
        values = definition(target).defaults()
        store.store(name=f"{name}_defaults", node={key: values} if key else values)
    for group, options in named_options().items():
        for option in options:
            if not (folder / group / f"{option}.yaml").exists():
                store.store(group=group, name=option, node={"name": option})
    # A file in conf/fit serves all tasks, and another documents of every format.
    tasks = [path.stem for path in (Path(__file__).parent / "data" / "synthetic").glob("[!_]*.py")]
    texts = ["datatrove", "huggingface", "jsonl", "megatron", "mixture", "parquet"]
    for fit, names in {"_task": tasks, "text": texts}.items():
        for name in names:
            store.store(group="fit", name=name, package="_global_", node={"defaults": [fit]})
    store.store(group="recipe", name="_stage", node=definition("seqtrain.convert.settings:StageConfig").defaults())
    files = sorted(path.stem for path in (folder / "mixer").glob("*.yaml"))
    mixers: dict[str, Any] = {name: mixer_definition(name).defaults() for name in mixer_names()}
    store.store(
        group="mixer", name="all", node={"defaults": ["_self_", *(f"{name}@{name}" for name in files)]} | mixers
    )


def _without_null(overrides: Sequence[str]) -> list[str]:
    """`overrides` with `GROUP=none` for `GROUP=null`, which Hydra refuses, where the group has such a choice."""
    groups = [path.parent.name for path in conf_dir().glob("*/none.yaml")]
    return [re.sub(rf"^({'|'.join(groups)})=null$", r"\1=none", word) if groups else word for word in overrides]


def _note_presets(config: DictConfig, choices: Mapping[str, Any]) -> None:
    """Writes what was chosen into `config.presets`, where there is such a key."""
    if "presets" in config:
        shown = [group for group in reversed(list(choices)) if "/" not in group and group not in ("mixer", "fit")]
        config.presets = {group: choices[group] for group in shown}


def _explain_composition(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """One line for what Hydra and OmegaConf say in several."""
    text = str(error)
    if missing := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = missing.groups()
        return unknown_name(f"{group}=", option, _options(group))
    if key := re.search(r"Could not override '([^'@]+)", text):
        return _explain_key(key[1], name, overrides)
    if (missing := re.search(r"Interpolation key '(.+)' not found", text)) and (
        key := re.search(r"full_key: (.+)", text)
    ):
        return f"{key[1]}: ${{{missing[1]}}} names no key; type \\${{{missing[1]}}} for the text itself"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{' '.join(overrides)}: {'; '.join(lines)}" if overrides else "; ".join(lines)


def _options(group: str) -> set[str]:
    """The choices of `group`: files in conf/, and names that its dataclass allows."""
    return {path.stem for path in (conf_dir() / group).glob("[!_]*.yaml")} | set(named_options().get(group, ()))


def _explain_key(key: str, name: str, overrides: Sequence[str]) -> str:
    """The first part of `key` that the config `name` does not have, beside the keys it has there."""
    # What it has depends on what else was chosen.
    node, known = compose_config(name, [each for each in overrides if each.partition("=")[0] != key]), ""
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            break
        node, known = node[part], f"{known}{part}."
    children = [str(child) for child in node] if isinstance(node, DictConfig) else []
    return unknown_name("config key", known + part, [known + child for child in children])


def read_settings(cls: type[T], arguments: Sequence[str]) -> T:
    """`cls` from `key=value` arguments. Raises `ConfigError` for a wrong key or value."""
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is not key=value; --help lists the keys")
    types = dict(definition(f"{cls.__module__}:{cls.__qualname__}").value_types())
    words = [_as_yaml(word) if types.get(word.partition("=")[0]) == "text" else word for word in arguments]
    try:
        values = OmegaConf.to_container(OmegaConf.from_cli(words))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(arguments)}: {' '.join(str(error).split())}") from error
    return validate(cls, {str(key): value for key, value in values.items()})  # type: ignore[union-attr]


def _as_yaml(word: str) -> str:
    """`key=text` with the text in quotes, where it has none."""
    key, _, text = word.partition("=")
    return word if text[:1] in ("'", '"') and text[:1] == text[-1:] else f"{key}={json.dumps(text)}"


def split_settings(cls: type[T], name: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """The settings given as `name.key=value`, and all other arguments. Raises `ConfigError` as `read_settings` does."""
    prefix = f"{name}."
    own = [word.removeprefix(prefix) for word in arguments if word.startswith(prefix)]
    return read_settings(cls, own), [word for word in arguments if not word.startswith(prefix)]


def launch(
    name: str,
    arguments: Sequence[str],
    read: Callable[[DictConfig], T],
    run: Callable[[T], int],
    outcome: Callable[[Path], str] = lambda folder: "",
) -> int:
    """Reads `arguments` as Hydra does and runs what they ask for; gives the exit status.

    `name`: the primary config in conf/. `read` gives the typed config and raises `ConfigError`; it is called for every
    point of a sweep before the first one starts. `run` does the work. Each point of a sweep has its own `output_dir`,
    below the one given; at the sweep's end a table says what `outcome` says of that folder. A `SeqtrainError` is
    raised; one in a run of a sweep is printed, status 2.
    """
    parsed = _parse(name, arguments)
    if parsed.multirun:
        return _sweep(name, parsed, read, run, outcome)
    config = compose_config(name, parsed.overrides)
    with _fresh_folder(config, parsed.overrides) as folder:
        if folder:
            config = copy.deepcopy(config)
            config.output_dir = folder
        return run(read(config))


def _sweep(
    name: str,
    parsed: argparse.Namespace,
    read: Callable[[DictConfig], T],
    run: Callable[[T], int],
    outcome: Callable[[Path], str],
) -> int:
    if take(parsed.overrides, "run")[0] is not None:
        raise ConfigError("run: resumes one run; leave out --multirun")
    every = points(parsed.overrides)
    for overrides in every:
        read(compose_config(name, overrides))
    # What the points differ in, as it was typed.
    same = set.intersection(*map(set, every))
    rows: list[tuple[int, str, str]] = []

    def job(config: DictConfig) -> None:
        point = " ".join(word for word in every[len(rows)] if word not in same)
        config.output_dir = HydraConfig.get().runtime.output_dir
        _note_presets(config, HydraConfig.get().runtime.choices)
        print(f"point {len(rows) + 1} of {len(every)}: {point}", flush=True)
        status = exit_status(lambda: run(read(config)))
        rows.append((status, point, f"{outcome(Path(config.output_dir))}  {config.output_dir}"))

    with _fresh_folder(compose_config(name, every[0]), parsed.overrides) as folder:
        if folder:
            parsed.overrides.append(f"output_dir={folder}")
        _run_hydra(parsed, get_args_parser(), job, str(conf_dir()), name)
    width = max(len(point) for _, point, _ in rows)
    print("\n".join(["", *(f"{point:<{width}}  {found if not status else 'failed'}" for status, point, found in rows)]))
    return max(status for status, _, _ in rows)


@contextmanager
def _fresh_folder(config: DictConfig, overrides: Sequence[str]) -> Iterator[str]:
    """A folder that no other start has, called as `config.output_dir` where `overrides` name none; else "".

    It is made now, so that of two starts in one second each has its own, and removed again if it stays empty.
    """
    named = any(word.partition("=")[0] in ("output_dir", "run") for word in overrides)
    # Of torchrun's ranks, the first tells the others.
    if named or "output_dir" not in config or os.environ.get("RANK", "0") != "0":
        yield ""
        return
    asked = Path(config.output_dir)
    made = [path for path in asked.parents if not path.exists()]
    names = (asked.with_name(f"{asked.name}-{number}") if number > 1 else asked for number in count(1))
    try:
        asked.parent.mkdir(parents=True, exist_ok=True)
        folder = next(path for path in names if make_new_folder(path))
    except OSError as error:
        raise ConfigError(f"output_dir={asked}: can't be written ({error.strerror}); choose another") from None
    try:
        yield str(folder)
    finally:
        with suppress(OSError):
            for path in (folder, *made):
                if path.exists():
                    path.rmdir()


def _parse(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """`arguments` as Hydra's flags and overrides, with text put in quotes."""
    parsed = _flags(arguments)
    parsed.overrides = quote_text(_without_null(parsed.overrides), _value_types(name), sweep=parsed.multirun)
    return parsed


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags, wherever they stand among the overrides. Raises `ConfigError` for others."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help says what there is")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parsed: argparse.Namespace = parser.parse_intermixed_args(arguments)
    return parsed


def check_keys(name: str, arguments: Sequence[str]) -> None:
    """Composes what `arguments` ask for, so that a wrong key is known before the program is imported."""
    parsed = _parse(name, arguments)
    for overrides in points(parsed.overrides) if parsed.multirun else [parsed.overrides]:
        compose_config(name, overrides)


def asks_for_text(arguments: Sequence[str]) -> bool:
    """Whether `arguments` ask for help, a composed config or the like instead of a run."""
    asked = _flags(arguments)
    return any((asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion))


def show_text(name: str, arguments: Sequence[str]) -> int:
    """Prints what `arguments` ask Hydra for about the primary config `name`; gives the exit status."""
    parsed = _parse(name, arguments)
    _offer_defaults(conf_dir())
    if parsed.cfg or parsed.info:
        config = compose_config(name, parsed.overrides)
    if parsed.cfg == "job" and not parsed.package:
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=parsed.resolve)  # type: ignore[assignment]
        text = "\n".join(commented(values, meanings(name)))
        if not parsed.resolve:
            keep_composed(name, arguments, text)
        print(text)
        return 0
    try:
        _run_hydra(parsed, get_args_parser(), lambda config: None, str(conf_dir()), name)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
