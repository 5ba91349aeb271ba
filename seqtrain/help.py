"""What commands print about themselves: `--help`, and the values of `--cfg job` with their meanings.

All of it is read from sources and YAML files, so that no help waits for torch or Hydra.
"""

import contextlib
import hashlib
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import platformdirs

from seqtrain.files import replace_file
from seqtrain.schema import (
    PROGRAMS,
    ROOT,
    Definition,
    Key,
    conf_dir,
    definition,
    mixer_definition,
    mixer_names,
    named_options,
)

WIDTH = 100
UNBROKEN: Any = {"break_on_hyphens": False, "break_long_words": False}
EXAMPLE = r"^ *((?:python|seqtrain|torchrun) .*)$"


def program(name: str) -> str:
    """How the command `name` is started where this process was, so that what is printed can be typed.

    `python launch/generate.py` for a script of a checkout, else `seqtrain generate`.
    """
    started = Path(sys.argv[0]).absolute()
    folders = ("launch", "tools")
    found = [started.parent.parent / folder for folder in folders] if started.parent.name in folders else []
    scripts = (script for folder in found for script in folder.glob("*.py"))
    script = next((each for each in scripts if f'run("{name}"' in each.read_text()), None)
    if script is None:
        return f"seqtrain {name}"
    return f"python {script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script}"


def command_line(name: str, *words: str) -> str:
    """The line of a shell that starts the command `name` with `words`."""
    return " ".join([program(name), *map(shlex.quote, words)])


def examples(name: str, text: str) -> list[str]:
    """The command lines in `text`, the docstring of the command `name`, as one types them."""
    lines = (re.sub(r"(?<=\S) {4,}(?=[^ #])", " ", line) for line in re.findall(EXAMPLE, text, re.MULTILINE))
    return [re.sub(r"^seqtrain [\w-]+|python (launch|tools)/\w+\.py", program(name), line, count=1) for line in lines]


def page(name: str, text: str, sections: Mapping[str, Definition], config: str = "") -> str:
    """The help of the command `name`: what it is for, examples, and a table of its keys.

    `text`: what it says of itself, with examples as indented command lines. `sections`: the definitions of its keys by
    the prefix they are typed with. `config`: its primary config in conf/, whose groups are its choices.
    """
    if config:
        target, key = PROGRAMS[config]
        sections = {**sections, f"{key}." if key else "": definition(target)}
    about = [part for part in text.split("\n\n") if not re.match(EXAMPLE, part, re.MULTILINE)]
    lines = [about[0], "", *(_broken(line) for line in examples(name, text)), ""]
    for part in about[1:]:
        lines += [textwrap.fill(part, WIDTH), ""]
    if choices := list(_choices(config)) if config else []:
        lines += ["Choices, as GROUP=CHOICE; a choice brings values for the keys below.", "", *choices, ""]
    values = _values(config) if config else {}
    lines += ["Keys, as KEY=VALUE:", "", *_table(list(_rows(sections, values)))]
    if config:
        lines += ["", f"`{program(name)} --cfg job` prints the values in force, the keys of the mixers among them."]
    return "\n".join(lines)


def _broken(line: str) -> str:
    """A command line in the width of a terminal; its comment may stand out."""
    if "  #" in line:
        return f"    {line}"
    return " \\\n".join(textwrap.wrap(line, WIDTH - 8, initial_indent="    ", subsequent_indent=" " * 8, **UNBROKEN))


def commented(values: Mapping[str, Any], meanings: Mapping[str, str], path: str = "") -> Iterator[str]:
    """The lines of `values` as YAML, each with what `meanings` says of its dotted key."""
    indent = "  " * path.count(".")
    for name, value in values.items():
        key = path + name
        if isinstance(value, Mapping) and any(each.startswith(f"{key}.") for each in meanings):
            yield f"{indent}{name}:"
            yield from commented(value, meanings, f"{key}.")
        else:
            line = f"{indent}{name}: {_yaml(value)}"
            yield f"{line:<42} # {meanings[key]}" if meanings.get(key) else line


def meanings(config: str) -> dict[str, str]:
    """What every key of the primary config `config` means, those of the mixers included, by dotted names."""
    if config not in PROGRAMS:
        return {}
    target, key = PROGRAMS[config]
    sections = {f"{key}." if key else "": definition(target)}
    if config != "convert":
        sections |= {f"mixer.{name}.": mixer_definition(name) for name in mixer_names()}
    own = {name: meaning for name, _, meaning in _rows(sections, {})}
    return meanings("pretrain") | own if key else own


def composed_before(config: str, arguments: Sequence[str]) -> str:
    """What `keep_composed` kept of the same arguments and sources; empty if nothing, or if a run's config counts."""
    if any(word.startswith("run=") for word in arguments):
        return ""
    if not any(word in ("--cfg", "-c") or word.startswith("--cfg=") for word in arguments):
        return ""
    file = _composed_file(config)
    kept, _, text = file.read_text().partition("\n") if file.is_file() else ("", "", "")
    return text if kept == _key(arguments) else ""


def keep_composed(config: str, arguments: Sequence[str], text: str) -> None:
    """Keeps `text`, what `--cfg job` prints for `arguments`, in the user's cache folder: composing takes seconds."""
    file = _composed_file(config)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, f"{_key(arguments)}\n{text}".encode(), durable=False)


def _composed_file(config: str) -> Path:
    return Path(platformdirs.user_cache_dir("seqtrain")) / f"composed-{config}"


def _key(arguments: Sequence[str]) -> str:
    """A hash of `arguments` and of all that the composed config is made of: sources and conf/."""
    files = sorted([*(ROOT / "seqtrain").rglob("*.py"), *conf_dir().rglob("*.yaml")])
    stamps = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    return hashlib.sha256(repr((list(arguments), stamps)).encode()).hexdigest()


def _read(config: str) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load((conf_dir() / f"{config}.yaml").read_text())
    return values


def groups(config: str) -> dict[str, str]:
    """The groups that a choice is taken from in the primary config `config`, and the choice without an override."""
    found: dict[str, str] = {}
    for entry in _read(config)["defaults"]:
        if isinstance(entry, str) and "/" not in entry and (conf_dir() / f"{entry}.yaml").exists():
            found |= groups(entry)
        elif isinstance(entry, dict):
            group, choice = next(iter(entry.items()))
            if group.isidentifier() and group != "mixer":
                found[group] = choice
    return found


def _choices(config: str) -> Iterator[str]:
    for group, chosen in groups(config).items():
        files = {path.stem for path in (conf_dir() / group).glob("[!_]*.yaml")}
        names = sorted(files | {chosen, *named_options().get(group, ())})
        words = " ".join(f"[{name}]" if name == chosen else name for name in names)
        yield from textwrap.wrap(f"  {group:<12}{words}", WIDTH, subsequent_indent=" " * 14, **UNBROKEN)


def _values(config: str) -> dict[str, Any]:
    """What the primary config `config` itself says of its keys, by their dotted names."""
    return dict(_dotted({key: value for key, value in _read(config).items() if key not in ("defaults", "hydra")}))


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _rows(sections: Mapping[str, Definition], values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for prefix, found in sections.items():
        for name, key in found.keys().items():
            if key.nested:
                yield from _rows({f"{prefix}{name}.": key.nested}, values)
            elif key.default != {}:
                default = values.get(prefix + name, key.default)
                yield prefix + name, "required" if default is MISSING else _yaml(default), _meaning(key)


def _meaning(key: Key) -> str:
    """The first sentence of a key's comment, and the values it may have where they are few."""
    sentence = re.split(r"(?<=[.;]) (?=[A-Z`])", key.comment, maxsplit=1)[0].rstrip(".;")
    options = re.findall(r"'([^']+)'", key.type) if "Literal[" in key.type else []
    if len(options) > 1 and not all(re.search(rf"\b{re.escape(option)}\b", sentence) for option in options):
        sentence += f" ({', '.join(options)})"
    return sentence.strip()


def _table(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    names = max(len(name) for name, _, _ in rows) + 2
    defaults = min(max(len(default) for _, default, _ in rows), 18) + 2
    above = ""
    for name, default, comment in rows:
        # Fields that share a comment stand below it.
        meaning, above = "" if comment == above else comment, comment
        # A long default has lines of its own, above its meaning.
        beside = len(default) < defaults
        head = f"  {name:<{names}}" + (f"{default:<{defaults}}" if beside else "")
        indent = " " * (2 + names + defaults)
        lines = textwrap.wrap(meaning, WIDTH, initial_indent=indent, subsequent_indent=indent, **UNBROKEN)
        if beside:
            yield (head + "".join(lines[:1]).strip()).rstrip()
            yield from lines[1:]
        else:
            yield from textwrap.wrap(
                default, WIDTH, initial_indent=head, subsequent_indent=" " * (2 + names), **UNBROKEN
            )
            yield from lines


def _yaml(value: Any) -> str:
    import yaml

    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.strip().removesuffix("...").strip() or "''"
