"""Chooses a backend for an operator, and says once which and why."""

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch

from seqtrain.errors import unknown_name
from seqtrain.kernels import gpu, outside

log = logging.getLogger("seqtrain.kernels")

BACKENDS = ("reference", "chunked", "triton", "native", "flash", *outside.NAMES)
# Fastest first; `reference` is the definition and is only taken when asked for by name.
PREFERENCE = {"cuda": ("flash", *outside.NAMES, "triton", "chunked"), "cpu": ("native", "chunked")}

# Functions that a backend may have, each with the backend and function taken where it has none. One turn of the
# definition's loop is cheapest for one token per row.
FUNCTIONS = {"step": ("reference", "run"), "find_map": ("chunked", "find_map"), "read": ("chunked", "read")}


def reset_backend_choice() -> None:
    """Makes every operator choose, and say why, again: a process that starts another run has another log."""
    choose.cache_clear()
    outside.disagreement.cache_clear()


@cache
def choose(operator: str, package: str, backends: tuple[str, ...], requested: str, device_type: str) -> str:
    """The backend of `operator` that `requested` ("auto", or one by name) is on this type of device.

    `package`: where the modules `backends` lie. Raises `ValueError` where it is unknown or can't run here.
    """
    if requested not in (*BACKENDS, "auto"):
        raise ValueError(f"{operator}: " + unknown_name("backend", requested, (*BACKENDS, "auto")))
    refused: list[str] = []
    preferred = [x for x in PREFERENCE.get(device_type, ("chunked",)) if x in backends or x not in outside.NAMES]
    for name in preferred if requested == "auto" else (requested,):
        reason = _why_not(operator, package, backends, name, device_type)
        if reason is None:
            log.info("%s: %s%s", operator, name, f" ({'; '.join(refused)})" if refused else "")
            return name
        refused.append(f"{name} {reason}")
    raise ValueError(f"{operator}: backend={requested} can't run here: {'; '.join(refused)}")


def otherwise(operator: str, package: str, backends: tuple[str, ...], device_type: str) -> str:
    """What "auto" would be without other packages."""
    own = [x for x in PREFERENCE.get(device_type, ("chunked",)) if x not in outside.NAMES]
    return next(x for x in own if _why_not(operator, package, backends, x, device_type) is None)


def _why_not(operator: str, package: str, backends: tuple[str, ...], name: str, device_type: str) -> str | None:
    if name == "triton" and (reason := gpu.refuses(device_type)):
        return reason
    if name not in backends:
        return f"has no {operator} in this version"
    if name in outside.NAMES and device_type not in outside.DEVICES:
        return "needs a CUDA device"
    # A backend that depends on the machine (a compiler, a GPU generation) says so itself.
    reason = None if name == "reference" else getattr(_module(package, name), "unavailable", lambda: None)()
    if reason is None and name in outside.NAMES:
        return outside.disagreement(package, name, device_type)
    return reason


def _module(package: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{package}.{backend}")


def function_of(package: str, backend: str, name: str, otherwise: str = "chunked") -> Callable:
    """The function `name` of a backend, or the one that `FUNCTIONS` puts in its place.

    Where the backend has `serves`, arguments that it does not serve go to `otherwise`: the chunked form or, of a
    backend that is another package's, our own, which has its other functions, too.
    """
    if backend == "reference":
        return importlib.import_module(package).reference
    module = _module(package, backend)
    found, serves = getattr(module, name, None), getattr(module, "serves", None)
    if found is None:
        return (
            function_of(package, otherwise, name)
            if backend in outside.NAMES
            else function_of(package, *FUNCTIONS[name])
        )
    if serves is None:
        return found
    other = function_of(package, otherwise, "run" if name == "step" and otherwise == "chunked" else name)

    @wraps(found)
    def choose(*arguments: Any) -> Any:
        return (found if serves(*arguments) else other)(*arguments)

    return choose


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context in which autocast leaves matrix products alone: recurrences multiply in the dtype of their states."""
    # The meta device, where shapes alone are found, has no autocast of its own.
    kind = "cpu" if device.type == "meta" else device.type
    # Entering one takes as long as checking a call.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
