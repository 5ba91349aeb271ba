"""Values as instances of dataclasses, strictly; a mistake is one line that names the key. Knows nothing of Hydra."""

import dataclasses
import difflib
import json
import keyword
import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from seqtrain.errors import ConfigError, unknown_name

T = TypeVar("T")

# What a key holds whose value follows from what is there.
AUTO: Any = "auto"


def _or_auto(value: Any, check_number: ValidatorFunctionWrapHandler) -> Any:
    return value if value == AUTO else check_number(value)


OrAuto = WrapValidator(_or_auto)

# No key takes a number of this size; integers up to it are exact in every format that reads them.
LARGEST = 2**53


def expand(path: str) -> str:
    """`path` with `~`, `$HOME` and other variables as they are for whoever runs the program."""
    return os.path.expanduser(os.path.expandvars(path))


# The name of a file or folder, expanded.
FilePath = Annotated[str, AfterValidator(expand)]


def validate(cls: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """`values` as an instance of the dataclass `cls`, strictly: no unknown key, no coerced type.

    A key that is a word of Python, such as `as`, is that of the field `as_`.
    `prefix` is put before the keys that errors name. Raises `ConfigError` for the first key that is wrong.
    """
    values = _with_fields(cls, values)
    for key, allowed in _unknown_keys(cls, values, prefix):
        raise ConfigError(unknown_name("config key", key, allowed))
    for key, number in _numbers(values, prefix):
        if not abs(number) < LARGEST:
            raise ConfigError(f"{key.rstrip('_')}={number}: must be a finite number below {LARGEST:.0e}")
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain_value(error, prefix)) from error


def _with_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with names of fields for keys, those of nested dataclasses, too."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    named = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values.items()}
    nested = {key for key, value in named.items() if isinstance(value, Mapping) and isinstance(fields.get(key), type)}
    nested = {key for key in nested if dataclasses.is_dataclass(fields[key])}
    return {key: _with_fields(fields[key], value) if key in nested else value for key, value in named.items()}


def _numbers(values: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """The numbers in `values` with their keys."""
    if isinstance(values, int | float):
        yield key, values
    named = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for name, value in named:
        yield from _numbers(value, f"{key}{name}" if not key or key.endswith(".") else f"{key}.{name}")


def _unknown_keys(cls: type, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, list[str]]]:
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            yield (prefix + key).rstrip("_"), [(prefix + name).rstrip("_") for name in fields]
        elif dataclasses.is_dataclass(fields[key]) and isinstance(value, Mapping):
            yield from _unknown_keys(fields[key], value, f"{prefix}{key}.")
        elif isinstance(value, Mapping) and get_origin(fields[key]) is Mapping:
            # Perhaps dataclasses by name.
            named: Any = get_args(fields[key])[1]
            for name, each in value.items():
                if isinstance(named, type) and dataclasses.is_dataclass(named) and isinstance(each, Mapping):
                    yield from _unknown_keys(named, each, f"{prefix}{key}.{name}.")


def _explain_value(error: ValidationError, prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    key = prefix + ".".join(str(part).rstrip("_") for part in first["loc"])
    if first["type"] == "missing":
        return f"{key}: is required"
    rule = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    allowed = re.findall(r"'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
    near = difflib.get_close_matches(str(first["input"]), allowed, n=1, cutoff=0.5)
    return f"{key}={_as_typed(first['input'])}: {rule}" + (f"; did you mean {near[0]!r}?" if near else "")


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
