"""From YAML and overrides to typed, checked dataclasses; every mistake becomes one line before anything starts.

Hydra composes; pydantic checks the result against the dataclasses of the program. Neither the dataclasses nor the
registries are known here: a launcher passes them in.
"""

import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from seqtrain.errors import ConfigError, SeqtrainError, exit_status, unknown_name

T = TypeVar("T")


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"{package.parent / 'conf'}: the configuration folder is missing; reinstall seqtrain")


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed config `name` with `overrides`. Raises `ConfigError` with one line."""
    _offer_every_mixer()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose(name, overrides=list(overrides))
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain_composition(error, name, overrides)) from error


def _offer_every_mixer() -> None:
    """Makes `mixer: all` a group option that holds every file of conf/mixer, so that a new mixer is one more file."""
    names = sorted(path.stem for path in (conf_dir() / "mixer").glob("*.yaml"))
    node = {"defaults": [f"{name}@{name}" for name in names]}
    ConfigStore.instance().store(group="mixer", name="all", node=node)


def validate(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """`values` as an instance of the dataclass `cls`, strictly: no unknown key, no coerced type.

    `prefix` is put before the keys that errors name. Raises `ConfigError` for the first key that is wrong.
    """
    for key, allowed in _unknown_keys(cls, values, prefix):
        raise ConfigError(unknown_name("config key", key, allowed))
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain_value(error, prefix)) from error


def _unknown_keys(cls: type, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, list[str]]]:
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            yield prefix + key, [prefix + name for name in fields]
        elif dataclasses.is_dataclass(fields[key]) and isinstance(value, Mapping):
            yield from _unknown_keys(fields[key], value, f"{prefix}{key}.")


def _explain_value(error: ValidationError, prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key}: is required"
    rule = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    allowed = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
    near = difflib.get_close_matches(str(first["input"]), allowed, n=1, cutoff=0.5)
    return f"{key}={_as_typed(first['input'])}: {rule}" + (f"; did you mean {near[0]!r}?" if near else "")


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _explain_composition(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """One line for what Hydra and OmegaConf say in several."""
    text = str(error)
    if missing := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = missing.groups()
        return unknown_name(f"{group}=", option, (path.stem for path in (conf_dir() / group).glob("*.yaml")))
    if key := re.search(r"Could not override '([^'@]+)", text):
        return _explain_key(key[1], name, overrides)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{' '.join(overrides)}: {'; '.join(lines)}" if overrides else "; ".join(lines)


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


def read_settings(cls: type[T], arguments: Sequence[str], *, about: str | None) -> T:
    """`cls` from `key=value` arguments; `--help` prints `about` and the dataclass itself, defaults and units included.

    A wrong key or value is printed as one line, and the command exits with status 2.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{about}\n\nSettings, as key=value:\n\n{inspect.getsource(cls)}")
        sys.exit(0)
    try:
        for argument in arguments:
            if "=" not in argument:
                raise ConfigError(f"{argument!r} is not key=value; --help lists the keys")
        values = OmegaConf.to_container(OmegaConf.from_cli(list(arguments)))
        return validate(cls, {str(key): value for key, value in values.items()})  # type: ignore[union-attr]
    except SeqtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def split_settings(cls: type[T], name: str, arguments: Sequence[str], *, about: str | None) -> tuple[T, list[str]]:
    """The settings given as `name.key=value`, and all other arguments. `--help` and mistakes as in `read_settings`."""
    prefix = f"{name}."
    own = [word.removeprefix(prefix) for word in arguments if word.startswith(prefix) or word in ("-h", "--help")]
    others = [word for word in arguments if not word.startswith(prefix)]
    return read_settings(cls, own, about=about), others


def launch(name: str, arguments: Sequence[str], read: Callable[[DictConfig], T], run: Callable[[T], int]) -> int:
    """Reads `arguments` as Hydra does and runs what they ask for; gives the exit status.

    `name`: the primary config in conf/. `read` gives the typed config and raises `ConfigError`; it is called for every
    point of a sweep before the first one starts. `run` does the work. Each point of a sweep has its own `output_dir`,
    below the one given. A `SeqtrainError` before the first run is raised; one in a run is printed, status 2.
    """
    statuses = [0]

    def job(config: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            config.output_dir = HydraConfig.get().runtime.output_dir
        statuses.append(exit_status(lambda: run(read(config))))

    parser = get_args_parser()
    parsed = parser.parse_args(arguments)
    for overrides in _points(parsed.overrides, parsed.multirun):
        read(compose_config(name, overrides))
    _run_hydra(parsed, parser, job, str(conf_dir()), name)
    return max(statuses)


def check_keys(name: str, arguments: Sequence[str]) -> None:
    """Composes what `arguments` ask for, so that a wrong key is known before the program is imported."""
    parsed = get_args_parser().parse_args(arguments)
    for overrides in _points(parsed.overrides, parsed.multirun):
        compose_config(name, overrides)


def asks_for_text(arguments: Sequence[str]) -> bool:
    """Whether `arguments` ask for help, a composed config or the like instead of a run."""
    asked = get_args_parser().parse_args(arguments)
    return any((asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion))


def show_text(name: str, arguments: Sequence[str]) -> int:
    """Prints what `arguments` ask Hydra for about the primary config `name`; gives the exit status."""
    parser = get_args_parser()
    parsed = parser.parse_args(arguments)
    _offer_every_mixer()
    if parsed.cfg or parsed.info:
        compose_config(name, parsed.overrides)
    try:
        _run_hydra(parsed, parser, lambda config: None, str(conf_dir()), name)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _points(overrides: Sequence[str], multirun: bool) -> list[Sequence[str]]:
    """The override lists of the runs a command line asks for: one, or the points of a sweep."""
    if not multirun:
        return [overrides]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return [point for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for point in batch]
