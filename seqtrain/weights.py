"""Weights as they are read: whole safetensors files, of finite real numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.errors import CheckpointError

# What safetensors call numbers that a weight may be written in.
REAL = ("F64", "F32", "F16", "BF16")


def open_weights(file: Path) -> Any:
    """safetensors' reader of `file`. Raises `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: incomplete or corrupt safetensors file ({reason})") from None


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in `file`, by its name. Raises `CheckpointError` for numbers that are no weights."""
    shapes = {}
    with open_weights(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            told = opened.get_slice(name)
            if told.get_dtype() not in REAL:
                raise CheckpointError(f"{file}: {name} is of {told.get_dtype()}, a weight of {', '.join(REAL)}")
            shapes[name] = tuple(told.get_shape())
    return shapes


def check_finite(where: object, name: str, weight: Tensor) -> None:
    """Raises `CheckpointError` for a weight with infinities or NaN, or too large for its type."""
    if weight.is_floating_point() and not torch.isfinite(weight).all():
        kind = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(f"{where}: {name} has numbers that are not finite as {kind}; nothing can be made of it")
