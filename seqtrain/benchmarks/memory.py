"""Peak resident memory of one training step's forward and backward pass over one long sequence, in this process.

    python tools/measure_memory.py   # 65,536 tokens, 12 layers of width 512, a vocabulary of 50k
    python tools/measure_memory.py tokens=8192 layers=[gla] activation_checkpointing=false
    python tools/measure_memory.py tokens=131072 limit_gib=8

Printed are peak memory (what the operating system saw, imports and weights included), time, tokens per second and
parameters; with `limit_gib` the exit status is 1 where the peak is above it.
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.config import read_settings
from seqtrain.memory import peak_resident_bytes
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.report import in_a_line, machine


@dataclass(frozen=True)
class Settings:
    # Tokens in the one sequence, and the documents of equal length it is packed from.
    tokens: Annotated[int, Field(gt=0)] = 65536
    documents: Annotated[int, Field(gt=0)] = 1
    # Mixers, repeated over the depth; each with its own defaults.
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "gated_delta_net",
        "gla",
        "hgrn2",
        "mamba2",
        "tensor_attention",
        "sliding_attention",
    )
    depth: Annotated[int, Field(gt=0)] = 12
    width: Annotated[int, Field(gt=0)] = 512
    heads: Annotated[int, Field(gt=0)] = 8
    vocab_size: Annotated[int, Field(gt=0)] = 50257
    activation_checkpointing: bool = True
    # As model.recompute_inputs.
    recompute_inputs: Literal["float32", "bfloat16"] = "float32"
    # bfloat16 is autocast over float32 weights.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # CPU threads; 0 leaves PyTorch's own number.
    threads: Annotated[int, Field(ge=0)] = 0
    # Peak memory above which the exit status is 1, GiB; 0: no limit.
    limit_gib: Annotated[float, Field(ge=0)] = 0.0


def measure(settings: Settings) -> dict[str, float]:
    """Builds the model, runs forward and backward, once on a token and once on all, and says what the latter took."""
    torch.manual_seed(0)
    same = ("layers", "depth", "width", "heads", "activation_checkpointing", "recompute_inputs")
    config = ModelConfig(**{name: getattr(settings, name) for name in same})
    mixers = {name: MIXERS.get(name).Config() for name in settings.layers}
    model = LanguageModel(config, mixers, settings.vocab_size)
    tokens = torch.randint(settings.vocab_size, (1, settings.tokens))

    def step(tokens: Tensor, documents: int) -> Tensor:
        length = tokens.shape[1]
        boundaries = torch.linspace(0, length, documents + 1).round().to(torch.int32)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = model(tokens, labels=tokens.roll(-1, 1), sequence=SequenceContext(cu_seqlens=boundaries))
        (loss / length).backward()
        return loss.detach()

    # What PyTorch loads in a first step (with checkpointing its compiler, 140 MiB) is not memory of the sequence.
    step(tokens[:, :1], 1)
    model.zero_grad()
    before, start = peak_resident_bytes(), time.perf_counter()
    loss = step(tokens, settings.documents)
    seconds = time.perf_counter() - start
    return {
        "peak_bytes": peak_resident_bytes(),
        "peak_bytes_before": before,
        "seconds": seconds,
        "tokens_per_second": settings.tokens / seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": loss.item() / settings.tokens,
    }


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    print(in_a_line(machine()))
    result = measure(settings)
    peak, before = (result[key] / 2**30 for key in ("peak_bytes", "peak_bytes_before"))
    print(
        f"{settings.tokens} tokens, {settings.depth} layers of {'+'.join(settings.layers)}, width {settings.width}, "
        f"vocabulary {settings.vocab_size}, checkpointing {settings.activation_checkpointing} (inputs "
        f"{settings.recompute_inputs}), {settings.dtype}"
    )
    print(
        f"peak memory {peak:.2f} GiB ({before:.2f} GiB before the forward pass), {result['seconds']:.1f} s, "
        f"{result['tokens_per_second']:.0f} tokens/s, {result['parameters']:,} parameters, loss {result['loss']:.3f}"
    )
    print(json.dumps(result))
    if settings.limit_gib and peak > settings.limit_gib:
        print(f"peak memory is above limit_gib={settings.limit_gib}", file=sys.stderr)
        return 1
    return 0
