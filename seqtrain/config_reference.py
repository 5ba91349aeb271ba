"""docs/configuration.md, written from the dataclasses and conf/: `python -m seqtrain.config_reference`.

Keys, types and defaults are those of the code, meanings are the comments above the fields.
"""

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from importlib import import_module
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import WrapValidator

from seqtrain.schema import PROGRAMS, ROOT, Definition, conf_dir, definition, mixer_definition, mixer_names
from seqtrain.validation import FilePath

PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Written by `python -m seqtrain.config_reference` from the code; change the comments there, not this page.

`key=value` on the command line sets a key, `group=choice` takes a choice of the list at the end. From weak to strong, a
value is that of the dataclass (the defaults below), of the quickstart (`conf/experiment/quickstart.yaml`), of what fits
`data=` (`conf/fit/`), of what fits `model=`, of the other groups, of `experiment=`, of what is typed. The choices that
a run was composed of are printed when it starts and stand in its `config.yaml` under `presets`. `auto` is replaced by
a number before anything starts. `--cfg job` prints the composed values.
"""
TITLES = {
    "pretrain": "seqtrain pretrain",
    "convert": "seqtrain convert",
    "generate": "seqtrain generate",
    "profile_throughput": "seqtrain profile, in addition to the keys of pretrain",
}
HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")


def write_reference() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_programs(), *_mixers(), *_choices()])


def _programs() -> Iterator[str]:
    shared = definition(PROGRAMS["pretrain"][0]).keys()
    for name, (target, key) in PROGRAMS.items():
        found = definition(target)
        sections = {part: field.nested for part, field in found.keys().items() if field.nested}
        yield f"## {TITLES[name]}\n"
        own = list(_rows(found, f"{key}." if key else "", skip=sections))
        yield from (*HEAD, *own, "")
        for section, nested in sections.items():
            if name != "pretrain" and section in shared:
                yield f"`{section}`: as in pretraining.\n"
            else:
                yield from _table(f"`{section}`", nested, f"{section}.")
    stage = definition("seqtrain.convert.settings:StageConfig")
    yield from _table("`recipe.stages.NAME`", stage, "")


def _mixers() -> Iterator[str]:
    yield "## Mixers\n\nThe keys below `mixer.NAME.`; those of the mixers that `model.layers` names are used.\n"
    for name in mixer_names():
        yield from _table(f"`{name}`", mixer_definition(name), "")


def _table(title: str, found: Definition, prefix: str) -> Iterator[str]:
    if rows := list(_rows(found, prefix)):
        yield f"### {title}\n"
        yield from (*HEAD, *rows, "")


def _choices() -> Iterator[str]:
    yield "## Choices\n"
    for folder in sorted(path for path in conf_dir().iterdir() if path.is_dir() and path.name not in ("fit", "mixer")):
        yield f"`{folder.name}=`\n"
        for path in sorted(folder.glob("[!_]*.yaml")):
            about = [line[2:] for line in path.read_text().splitlines() if re.match("# [^@]", line)]
            yield f"* `{path.stem}`: {' '.join(about)}"
        yield ""


def _rows(found: Definition, prefix: str, *, skip: Mapping[str, Any] = types.MappingProxyType({})) -> Iterator[str]:
    outer, *inner = found.path.split(".")
    cls = getattr(import_module(found.module.name), outer)
    for name in inner:
        cls = getattr(cls, name)
    hints = {name.rstrip("_"): hint for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
    for name, key in found.keys().items():
        if key.nested and name not in skip:
            yield from _rows(key.nested, f"{prefix}{name}.")
        elif name not in skip:
            default = "required" if key.default is MISSING else f"`{_yaml(key.default)}`"
            row = (f"`{prefix}{name}`", _words(hints[name]), default, key.comment)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _yaml(value: Any) -> str:
    if value == "":
        return '""'
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()


def _words(hint: Any) -> str:
    """A type as a reader of YAML calls it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint == FilePath:
        return "path"
    if origin is Annotated:
        return _bounded(*inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple:
        return f"list of {_words(inner[0])}" if inner[-1] is ... else f"list of {len(inner)}: {_words(inner[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true, false"}
    return names.get(hint, "mapping")


def _bounded(kind: Any, *annotations: Any) -> str:
    """`kind` with the bounds of its annotations; `auto` where one lets it through."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [bound for each in annotations for bound in getattr(each, "metadata", [each])]
    words = [
        f"{sign} {getattr(bound, name):g}" for bound in bounds for name, sign in signs.items() if hasattr(bound, name)
    ]
    auto = ["`auto`"] if any(isinstance(each, WrapValidator) for each in annotations) else []
    return " or ".join([*auto, " ".join([_words(kind), ", ".join(words)]).strip()])


if __name__ == "__main__":
    PAGE.write_text(write_reference())
