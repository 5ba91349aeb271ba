"""What a run leaves to the processor: probes find it at the first start, and every later one takes it over.

The bits of a run depend on it. So config.yaml and the manifests of checkpoints hold what was found, and a start in the
same folder, or from another run's checkpoint, probes nothing.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from seqtrain.config import read_run_config
from seqtrain.errors import SeqtrainError
from seqtrain.files import place
from seqtrain.kernels import products
from seqtrain.validation import AUTO

if TYPE_CHECKING:
    from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")


def dtype_of(config: "PretrainConfig") -> Literal["float32", "bfloat16"]:
    """`train.dtype`, in place of auto bfloat16 where products in it are faster on this machine."""
    if config.train.dtype != "auto":
        return config.train.dtype
    if found := _recorded(config).get("dtype"):
        return "bfloat16" if found == "bfloat16" else "float32"
    if config.runtime.device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if products.bfloat16_ratio() > products.WORTH else "float32"


def with_routine(config: "PretrainConfig") -> "PretrainConfig":
    """`config` with a routine in place of `kernels.linear=auto`; torch's where no product is large, or on GPUs."""
    if config.kernels.linear != AUTO:
        return config
    found: Any = _recorded(config).get("linear")
    if found is None:
        train, width = config.train, config.model.width
        tokens = min(train.segment_tokens or train.sequence_length, train.sequence_length) // config.parallel.sequence
        large = tokens * train.micro_batch_size * width * width >= products.LEAST
        on_gpu = config.runtime.device == "cuda" or (config.runtime.device != "cpu" and torch.cuda.is_available())
        found = products.fastest()[0] if large and not on_gpu and train.dtype == "float32" else "torch"
    return replace(config, kernels=replace(config.kernels, linear=found))


def say_dtype(config: "PretrainConfig") -> None:
    """Says on the log what the probe measured for `train.dtype=auto`, if there was one in this process."""
    if products.bfloat16_ratio.cache_info().currsize:
        ratio, dtype = products.bfloat16_ratio(), config.train.dtype
        log.info("train.dtype=auto: %s (products in bfloat16 are %.1f times as fast here)", dtype, ratio)


def _recorded(config: "PretrainConfig") -> dict[str, str]:
    """What the run that `config` goes on with has begun with: nothing where it is new."""
    folder = Path(config.output_dir)
    with suppress(SeqtrainError):
        values = read_run_config(folder, key="output_dir")
        train, kernels = (_section(values, name) for name in ("train", "kernels"))
        dtype, linear = train.get("dtype"), kernels.get("linear", "torch")
        if dtype != AUTO and linear != AUTO:
            return {"dtype": str(dtype), "linear": str(linear)}
    if (start := config.checkpoint.resume) in ("auto", "never"):
        manifests = sorted(folder.glob("checkpoints/step-*/manifest.json"))
    else:
        manifests = [place(start) / "manifest.json"]
    for manifest in reversed(manifests):
        with suppress(OSError, ValueError):
            trajectory = _section(json.loads(manifest.read_text()), "trajectory")
            train, kernels = (_section(trajectory, name) for name in ("train", "kernels"))
            return {"dtype": str(train["dtype"]), "linear": str(kernels.get("linear", "torch"))} if train else {}
    return {}


def _section(values: Any, name: str) -> Mapping[str, Any]:
    found = values.get(name) if isinstance(values, Mapping) else None
    return found if isinstance(found, Mapping) else {}
