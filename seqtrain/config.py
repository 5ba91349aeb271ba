"""From YAML and overrides to typed, checked dataclasses; every mistake becomes one line before anything starts.

Hydra composes what the dataclasses of a program say by default, the choices in conf/ and the overrides; pydantic checks
the result against the dataclasses. Their defaults are read from their source (`seqtrain.schema`), not imported.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from seqtrain.errors import ConfigError, exit_status, unknown_name
from seqtrain.schema import definition, mixer_definition, mixer_names
from seqtrain.validation import validate

T = TypeVar("T")


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"{package.parent / 'conf'}: the configuration folder is missing; reinstall seqtrain")


# The dataclass of each primary config in conf/, and the key it is put under there; its defaults are `NAME_defaults`.
PROGRAMS = {
    "pretrain": ("seqtrain.runtime.settings:PretrainConfig", ""),
    "convert": ("seqtrain.convert.settings:ConvertConfig", ""),
    "generate": ("seqtrain.runtime.generate:GenerateConfig", ""),
    "profile": ("seqtrain.profiling.profiler:ProfileConfig", "profile"),
}
# Groups whose options are the names that the dataclass of that key allows; a file in conf/ says more of one.
NAMED_GROUPS = ("optimizer", "schedule", "runtime")


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed config `name` with `overrides`, not to be changed. Raises `ConfigError` with one line."""
    return _composed(name, tuple(overrides), conf_dir())


@lru_cache(maxsize=1)
def _composed(name: str, overrides: tuple[str, ...], folder: Path) -> DictConfig:
    _offer_defaults(folder)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose(name, overrides=_without_null(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain_composition(error, name, overrides)) from error
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    _note_presets(config, choices)
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_composition(error, name, overrides)) from error
    return config


# Hydra's store holds those of one folder: for another, or the same after another, they are stored again.
@lru_cache(maxsize=1)
def _offer_defaults(folder: Path) -> None:
    """Gives Hydra what the dataclasses say: defaults, `mixer=all`, options that are names, a stage of a recipe.

    `folder`: the configuration, whose files say more of some.
    """
    store = ConfigStore.instance()
    for name, (target, key) in PROGRAMS.items():
        values = definition(target).defaults()
        store.store(name=f"{name}_defaults", node={key: values} if key else values)
    for group, options in _named_options().items():
        for option in options:
            if not (folder / group / f"{option}.yaml").exists():
                store.store(group=group, name=option, node={"name": option})
    store.store(group="recipe", name="_stage", node=definition("seqtrain.convert.recipe:StageConfig").defaults())
    files = sorted(path.stem for path in (folder / "mixer").glob("*.yaml"))
    mixers: dict[str, Any] = {name: mixer_definition(name).defaults() for name in mixer_names()}
    store.store(
        group="mixer", name="all", node={"defaults": ["_self_", *(f"{name}@{name}" for name in files)]} | mixers
    )


@cache
def _named_options() -> dict[str, list[str]]:
    """The names that the dataclass of each of `NAMED_GROUPS` allows."""
    fields = definition(PROGRAMS["pretrain"][0]).keys()
    nested = {group: fields[group].nested for group in NAMED_GROUPS}
    return {group: re.findall(r"'(\w+)'", found.keys()["name"].type) for group, found in nested.items() if found}


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
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{' '.join(overrides)}: {'; '.join(lines)}" if overrides else "; ".join(lines)


def _options(group: str) -> set[str]:
    """The choices of `group`: files in conf/, and names that its dataclass allows."""
    return {path.stem for path in (conf_dir() / group).glob("[!_]*.yaml")} | set(_named_options().get(group, ()))


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
    values = OmegaConf.to_container(OmegaConf.from_cli(list(arguments)))
    return validate(cls, {str(key): value for key, value in values.items()})  # type: ignore[union-attr]


def split_settings(cls: type[T], name: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """The settings given as `name.key=value`, and all other arguments. Raises `ConfigError` as `read_settings` does."""
    prefix = f"{name}."
    own = [word.removeprefix(prefix) for word in arguments if word.startswith(prefix)]
    return read_settings(cls, own), [word for word in arguments if not word.startswith(prefix)]


def launch(name: str, arguments: Sequence[str], read: Callable[[DictConfig], T], run: Callable[[T], int]) -> int:
    """Reads `arguments` as Hydra does and runs what they ask for; gives the exit status.

    `name`: the primary config in conf/. `read` gives the typed config and raises `ConfigError`; it is called for every
    point of a sweep before the first one starts. `run` does the work. Each point of a sweep has its own `output_dir`,
    below the one given. A `SeqtrainError` is raised; one in a run of a sweep is printed, status 2.
    """
    parser = get_args_parser()
    parsed = parser.parse_args(arguments)
    if not parsed.multirun:
        return run(read(compose_config(name, parsed.overrides)))
    statuses = [0]

    def job(config: DictConfig) -> None:
        config.output_dir = HydraConfig.get().runtime.output_dir
        _note_presets(config, HydraConfig.get().runtime.choices)
        statuses.append(exit_status(lambda: run(read(config))))

    for overrides in _points(parsed.overrides):
        read(compose_config(name, overrides))
    _run_hydra(parsed, parser, job, str(conf_dir()), name)
    return max(statuses)


def check_keys(name: str, arguments: Sequence[str]) -> None:
    """Composes what `arguments` ask for, so that a wrong key is known before the program is imported."""
    parsed = get_args_parser().parse_args(arguments)
    for overrides in _points(parsed.overrides) if parsed.multirun else [parsed.overrides]:
        compose_config(name, overrides)


def asks_for_text(arguments: Sequence[str]) -> bool:
    """Whether `arguments` ask for help, a composed config or the like instead of a run."""
    asked = get_args_parser().parse_args(arguments)
    return any((asked.help, asked.hydra_help, asked.cfg, asked.info, asked.shell_completion))


def show_text(name: str, arguments: Sequence[str]) -> int:
    """Prints what `arguments` ask Hydra for about the primary config `name`; gives the exit status."""
    parser = get_args_parser()
    parsed = parser.parse_args(arguments)
    _offer_defaults(conf_dir())
    if parsed.cfg or parsed.info:
        compose_config(name, parsed.overrides)
    try:
        _run_hydra(parsed, parser, lambda config: None, str(conf_dir()), name)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _points(overrides: Sequence[str]) -> list[Sequence[str]]:
    """The override lists of the points of a sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return [point for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for point in batch]
