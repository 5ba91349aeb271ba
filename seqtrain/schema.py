"""Dataclasses as their source states them: fields, types, defaults and comments, without importing their modules.

Help, defaults and the reference of the configuration are read here, so that none of them waits for torch.
"""

import ast
import builtins
import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from seqtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent

# The dataclass of each primary config in conf/, and the key it is put under there; its defaults are `NAME_defaults`.
PROGRAMS = {
    "pretrain": ("seqtrain.runtime.settings:PretrainConfig", ""),
    "convert": ("seqtrain.convert.settings:ConvertConfig", ""),
    "generate": ("seqtrain.runtime.generate:GenerateConfig", ""),
    "profile_throughput": ("seqtrain.profiling.profiler:ProfileConfig", "profile"),
}
# Groups whose options are the names that the dataclass of that key allows; a file in conf/ says more of one.
NAMED_GROUPS = ("optimizer", "schedule", "runtime")


@dataclass(frozen=True)
class Key:
    """One field of a dataclass."""

    # As it is typed: `as` for the field `as_`.
    name: str
    # The annotation as it is written.
    type: str
    # The value, or MISSING where there is none; a dict where the type is a dataclass.
    default: Any
    # The comment above it, or after it on its line.
    comment: str
    # Where the type is a dataclass.
    nested: "Definition | None" = None


@dataclass(frozen=True)
class Module:
    """A module of seqtrain, parsed."""

    name: str
    text: str
    tree: ast.Module

    def find(self, name: str) -> "Definition | None":
        """The class `name` (`Outer.Inner` for one within another) that this module defines or imports from seqtrain."""
        first, _, rest = name.partition(".")
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == first:
                return Definition(self, node, first).inner(rest)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("seqtrain"):
                for alias in node.names:
                    if (alias.asname or alias.name) == first:
                        return read_module(node.module).find(".".join(filter(None, (alias.name, rest))))
        return None

    def value(self, expression: ast.expr) -> Any:
        """What a default evaluates to, with the constants of this module, of seqtrain's others and Python's own."""
        # As globals, so that functions in it find them, too.
        return eval(compile(ast.Expression(expression), self.name, "eval"), _Names(self))


class _Names(dict[str, Any]):
    """The constants of a module, each evaluated when it is asked for."""

    def __init__(self, module: Module):
        super().__init__(__builtins__=builtins)
        self.module = module

    def __missing__(self, name: str) -> Any:
        for node in self.module.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if [getattr(target, "id", None) for target in targets] == [name]:
                return self.module.value(node.value)  # type: ignore[attr-defined]
            if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
                assert node.module
                if node.module.startswith("seqtrain"):
                    return _Names(read_module(node.module))[name]
                return getattr(importlib.import_module(node.module), name)
        raise KeyError(name)


@dataclass(frozen=True)
class Definition:
    """A class of seqtrain as its source states it."""

    module: Module
    node: ast.ClassDef
    # Its name in the module, `Outer.Inner` for one within another.
    path: str

    @property
    def is_dataclass(self) -> bool:
        return any("dataclass" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    def inner(self, name: str) -> "Definition | None":
        """The class `name` within this one or the classes it inherits from; itself for an empty name."""
        if not name:
            return self
        for node in self.node.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return Definition(self.module, node, f"{self.path}.{name}")
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None:
                return self.module.find(ast.unparse(node.value))
        return next((found for base in self.bases() if (found := base.inner(name))), None)

    def bases(self) -> list["Definition"]:
        """The classes of seqtrain that this one inherits from."""
        return [found for base in self.node.bases if (found := self.module.find(ast.unparse(base)))]

    @cache  # noqa: B019 - there are as many definitions as classes
    def keys(self) -> dict[str, Key]:
        """The fields by name, inherited ones first, as `dataclasses.fields` gives them.

        One that only has another default keeps the comment it inherits; else one without has that of the field above.
        """
        keys = {name: key for base in reversed(self.bases()) for name, key in base.keys().items()}
        above = ""
        for node in self.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                key = self._key(node, node.target.id)
                inherited = keys[key.name].comment if key.name in keys else above
                above = key.comment or inherited
                keys[key.name] = replace(key, comment=above)
        return keys

    def value_types(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """The dotted names, after `prefix`, of all fields, and what each takes: `text`, a `list` or another value."""
        for key in self.keys().values():
            if key.nested:
                yield from key.nested.value_types(f"{prefix}{key.name}.")
            else:
                kinds = {"text": key.type in ("str", "FilePath"), "list": "tuple[" in key.type}
                yield prefix + key.name, next((kind for kind, holds in kinds.items() if holds), "")

    def defaults(self) -> dict[str, Any]:
        """The values of the fields that have one, nested as they are, as a YAML file would hold them."""
        return {name: _plain(key.default) for name, key in self.keys().items() if key.default is not MISSING}

    def _key(self, node: ast.AnnAssign, name: str) -> Key:
        annotation = ast.unparse(node.annotation)
        nested = self.module.find(annotation) if annotation.isidentifier() else None
        nested = nested if nested and nested.is_dataclass else None
        return Key(name.rstrip("_"), annotation, self._default(node, nested), " ".join(self._comment(node)), nested)

    def _default(self, node: ast.AnnAssign, nested: "Definition | None") -> Any:
        if nested:
            return nested.defaults()
        if node.value is None:
            return MISSING
        value = self.module.value(node.value)
        if isinstance(value, dataclasses.Field):
            return value.default_factory() if value.default_factory is not MISSING else value.default
        return value

    def _comment(self, node: ast.AnnAssign) -> Iterator[str]:
        lines = self.module.text.splitlines()
        first = node.lineno - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        yield from (line.strip(" #") for line in lines[first : node.lineno - 1])
        assert node.end_lineno is not None
        rest = lines[node.end_lineno - 1][node.end_col_offset :]
        yield from (part.strip() for part in rest.split("#")[1:2])


def _plain(value: Any) -> Any:
    """`value` with lists for tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def definition(target: str) -> Definition:
    """The class that `target`, `package.module:Class`, names; followed through imports within seqtrain."""
    module, _, name = target.partition(":")
    found = read_module(module).find(name)
    if found is None:
        raise LookupError(f"{target}: no such class")
    return found


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"{package.parent / 'conf'}: the configuration folder is missing; reinstall seqtrain")


@lru_cache
def read_module(name: str) -> Module:
    """The module `name` of seqtrain, or of another package next to it, parsed but not imported."""
    path = ROOT.joinpath(*name.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return Module(name, text, ast.parse(text))


# Those of any model, and those of encoders alone.
MIXER_FOLDERS = ("mixers", "encoders")


def mixer_definition(name: str) -> Definition:
    """The `Config` of the mixer `name`: that of the only class in its file that has one, or inherits one."""
    folder = next(folder for folder in MIXER_FOLDERS if (ROOT / "seqtrain" / folder / f"{name}.py").exists())
    module = read_module(f"seqtrain.{folder}.{name}")
    classes = [Definition(module, node, node.name) for node in module.tree.body if isinstance(node, ast.ClassDef)]
    return next(config for each in classes if (config := each.inner("Config")))


def mixer_names() -> list[str]:
    """The names of all mixers: those of their files."""
    return sorted(path.stem for folder in MIXER_FOLDERS for path in (ROOT / "seqtrain" / folder).glob("[!_]*.py"))


@cache
def named_options() -> dict[str, list[str]]:
    """The names that the dataclass of each of `NAMED_GROUPS` allows."""
    fields = definition(PROGRAMS["pretrain"][0]).keys()
    nested = {group: fields[group].nested for group in NAMED_GROUPS}
    return {group: re.findall(r"'(\w+)'", found.keys()["name"].type) for group, found in nested.items() if found}
