"""Weights as integers, by torchao: what decoding reads of them is a fourth of float32, or less.

Matrices alone: norms, decays, convolutions and the embedding, of which a token reads a row, stay as they are. Experts
are no matrices of a linear layer, and stay as well.
"""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqtrain.errors import ConfigError

log = logging.getLogger("seqtrain.models")

Weights = Literal["float32", "int8", "int4"]
# Neighbors that share a factor, of four bits; of eight, a whole row does.
GROUP = 32
# Numbers from which a matrix is worth it.
LEAST = 1 << 14


def quantize(model: Any, weights: Weights) -> None:
    """Puts integers in the place of a `LanguageModel`'s matrices: a factor for each row, or with `int4` for 32 numbers.

    Rows of other lengths than multiples of 32 have eight bits with `int4`, too. The model is for reading from then on:
    its weights neither learn nor are saved. Raises `ConfigError` where torchao is not installed.
    """
    if weights == "float32":
        return
    # It says of each of its GPU libraries that it does not load here, and what torch has since renamed.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.granularity import PerRow
    except ImportError as error:
        raise ConfigError(f"weights={weights}: needs torchao; pip install 'seqtrain[quantize]'") from error
    before = after = 0
    for module in [*(each for each in model.modules() if isinstance(each, nn.Linear)), model.head]:
        weight = module.weight.detach().float()
        if weight.numel() < LEAST:
            continue
        if four := weights == "int4" and weight.shape[1] % GROUP == 0:
            held = IntxUnpackedToInt8Tensor.from_hp(weight, (1, GROUP), getattr(torch, "int4"))  # noqa: B009 (no stub has it)
        else:
            held = Int8Tensor.from_hp(weight, PerRow())
        before += module.weight.nbytes
        after += weight.numel() // (2 if four else 1) + held.scale.nbytes
        # The head's is its own then, and no longer the embedding's.
        module.weight = nn.Parameter(held, requires_grad=False)
    log.info("weights: matrices in %s, %.1f MiB in place of %.1f", weights, after / 2**20, before / 2**20)


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` is one of `quantize`'s."""
    return hasattr(weight, "qdata")


def integers_of(weight: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Of a matrix `[N,K]`: what the native library multiplies by, its factors `[N,K/group]`, and how they lie."""
    numbers, scale, width = weight.qdata, weight.scale.flatten(1).float(), weight.shape[1]
    if scale.shape[1] == 1:
        return numbers, scale, {"group": width}
    packed = getattr(weight, "packed", None)
    if packed is None:
        raised = (numbers + 8).to(torch.uint8).unflatten(1, (-1, 2, GROUP // 2))
        packed = (raised[:, :, 0] | (raised[:, :, 1] << 4)).flatten(1).contiguous()
        weight.packed = packed
    return packed, scale, {"group": GROUP, "four_bits": True}
