"""Finds implementations by file: the name of a module is the name users write in a config."""

import importlib
import pkgutil
from functools import cached_property
from types import ModuleType
from typing import Generic, TypeVar

from seqtrain.errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Every public module of `package` that defines one subclass of `base`, by module name.

    Packages, and modules whose name starts with an underscore, hold shared parts and are not entries. A module
    is imported when its entry is first asked for.
    """

    def __init__(self, what: str, package: str, base: type[T]):
        self.what = what
        self.package = package
        self.base = base

    @cached_property
    def names(self) -> tuple[str, ...]:
        path = importlib.import_module(self.package).__path__
        return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if not (m.ispkg or m.name.startswith("_"))))

    def get(self, name: str) -> type[T]:
        """The class registered as `name`. Raises `ConfigError` naming the nearest entry if there is none."""
        if name not in self.names:
            raise ConfigError(unknown_name(self.what, name, self.names))
        return self._entry(importlib.import_module(f"{self.package}.{name}"))

    def _entry(self, module: ModuleType) -> type[T]:
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, self.base) and value.__module__ == module.__name__
        ]
        assert len(own) == 1, f"{module.__name__} must define exactly one {self.base.__name__}, has {own}"
        return own[0]
