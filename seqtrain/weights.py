"""Weights as they are read: whole safetensors files, of finite real numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.errors import CheckpointError

# What safetensors call numbers that a weight may be written in.
REAL = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_weights(file: Path) -> Any:
    """safetensors' reader of `file`. Raises `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: incomplete or corrupt safetensors file ({reason})") from None


def tensors_in(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind, as safetensors call it, of every tensor in `file`, by its name. Raises `CheckpointError`."""
    found = {}
    with open_weights(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            told = opened.get_slice(name)
            found[name] = tuple(told.get_shape()), told.get_dtype()
    return found


def dtype_of(where: object, name: str, kind: str) -> torch.dtype:
    """The dtype of a tensor that safetensors call `kind`. Raises `CheckpointError` where it is none of a weight."""
    if kind not in REAL:
        raise CheckpointError(
            f"{where}: {name} is of {kind}, a weight of {', '.join(REAL)}; dequantize it where it is quantized"
        )
    return REAL[kind]


def check_finite(where: object, name: str, weight: Tensor) -> None:
    """Raises `CheckpointError` for a weight with infinities or NaN, or too large for its type."""
    if weight.is_floating_point() and not torch.isfinite(weight).all():
        kind = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(f"{where}: {name} has numbers that are not finite as {kind}; nothing can be made of it")
