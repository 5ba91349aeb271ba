"""Chooses a backend for an operator, and says once which and why."""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch

from seqtrain.errors import unknown_name
from seqtrain.kernels.custom_ops import constant

log = logging.getLogger("seqtrain.kernels")

BACKENDS = ("reference", "chunked", "triton", "native", "flash")
# Fastest first; `reference` is the definition and is only taken when asked for by name.
PREFERENCE = {"cuda": ("flash", "triton", "chunked"), "cpu": ("native", "chunked")}

# Device types Triton kernels run on; `seqtrain.analysis` adds the CPU where it interprets or compiles them.
TRITON_DEVICES = {"cuda"}

# Functions that a backend may have, each with the backend and function taken where it has none. One turn of the
# definition's loop is cheapest for a token a row.
FUNCTIONS = {"step": ("reference", "run"), "find_map": ("chunked", "find_map"), "read": ("chunked", "read")}

# What was chosen, by "operator.backend.function": torch.compile takes a name for a constant, but not a function.
_functions: dict[str, Callable] = {}


def choose(
    operator: str, requested: str, device: torch.device, *, single_token: bool = False, function: str = "run"
) -> Callable:
    """The function `run` of `seqtrain.kernels.<operator>.<backend>` for `requested` on `device`, or another `function`.

    `single_token`: the call decodes one token a row, which is the function `step`.
    A request that can't run here is refused, whether or not it has the function.
    Raises `ValueError` when `requested` is unknown or can't run here, with the reason.
    """
    name = _choose(operator, requested, device.type)
    function = "step" if single_token else function
    if f"{operator}.{name}.{function}" not in _functions:
        other, function = FUNCTIONS[function]
        name = _choose(operator, other, device.type)
    return _functions[f"{operator}.{name}.{function}"]


def reset_backend_choice() -> None:
    """Makes every operator choose, and say why, again: a process that starts another run has another log."""
    _choose_once.cache_clear()


@constant
def _choose(operator: str, requested: str, device_type: str) -> str:
    return _choose_once(operator, requested, device_type)


@cache
def _choose_once(operator: str, requested: str, device_type: str) -> str:
    if requested not in (*BACKENDS, "auto"):
        raise ValueError(f"{operator}: " + unknown_name("backend", requested, (*BACKENDS, "auto")))
    refused: list[str] = []
    for name in PREFERENCE.get(device_type, ("chunked",)) if requested == "auto" else (requested,):
        reason = _why_not(operator, name, device_type)
        if reason is None:
            log.info("%s: %s%s", operator, name, f" ({'; '.join(refused)})" if refused else "")
            module = importlib.import_module(f"seqtrain.kernels.{operator}.{name}")
            for function in ("run", *FUNCTIONS):
                if hasattr(module, function):
                    _functions[f"{operator}.{name}.{function}"] = getattr(module, function)
            return name
        refused.append(f"{name} {reason}")
    raise ValueError(f"{operator}: backend={requested} can't run here: {'; '.join(refused)}")


def _why_not(operator: str, backend: str, device_type: str) -> str | None:
    if backend == "triton" and device_type not in TRITON_DEVICES:
        return "needs a CUDA device"
    module = f"seqtrain.kernels.{operator}.{backend}"
    if importlib.util.find_spec(module) is None:
        return f"has no {operator} in this version"
    # A backend that depends on the machine (a compiler, a GPU generation) says so itself.
    return getattr(importlib.import_module(module), "unavailable", lambda: None)()


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast leaves matrix products alone: recurrences multiply in the dtype of their states."""
    return torch.autocast(device.type, enabled=False)
