"""What is computed again in the backward pass, so that a rank stays within `train.memory_budget`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from seqtrain.errors import ConfigError
from seqtrain.memory import peak_resident_bytes
from seqtrain.models.config import Recomputed
from seqtrain.planning.counts import ModelCounts
from seqtrain.planning.layout import Machine, compute_seconds, memory_bytes, read_cluster
from seqtrain.planning.run_config import at_once, counter_of, layout_of
from seqtrain.runtime.settings import PretrainConfig

GIB = 2**30
# Sets of `model.recompute` that differ, and whose parts each half of a block is made of, mixer and MLP.
Parts = tuple[Recomputed, ...]
NOTHING: Parts = ()
NORMS: Parts = ("norm",)
PARTS: Parts = ("mlp", "projection")
CHOICES: dict[Parts, tuple[Parts, Parts]] = {
    (): (NOTHING, NOTHING),
    ("norm",): (NORMS, NORMS),
    ("mlp",): (NOTHING, PARTS),
    ("projection",): (PARTS, NOTHING),
    ("norm", "mlp"): (NORMS, PARTS),
    ("norm", "projection"): (PARTS, NORMS),
    ("mlp", "projection"): (PARTS, PARTS),
    ("block",): (NOTHING, NOTHING),
}
# Bytes of a rank on CPUs before it has a model, beyond those of the process that starts it: DeepSpeed, a compiler's
# libraries; and what its allocator leaves unused, as `tools/plan.py plan.task=calibrate` finds it.
PROGRAM, UNUSED_KEPT, UNUSED_PASSING = 0.25e9, 0.05, 0.2


@dataclass(frozen=True)
class Choice:
    """A set of `model.recompute`, the bytes that a rank holds with it at most, and how long a micro-batch takes."""

    recompute: Parts
    bytes: float
    seconds: float


def within_budget(config: PretrainConfig, vocab_size: int) -> tuple[PretrainConfig, str]:
    """`config` with the cheapest `model.recompute` that fits `train.memory_budget`, and what to say of it.

    As it is, and with nothing to say, where there is no budget or the parts are named. Raises `ConfigError` where no
    set fits.
    """
    given = config.train.memory_budget
    if not given or config.model.recompute:
        return config, ""
    room = given if given > 1 else given * _memory(config)
    found = sorted(choices(config, vocab_size), key=lambda choice: choice.seconds)
    fitting = [choice for choice in found if choice.bytes <= room]
    least = min(found, key=lambda choice: choice.bytes)
    if not fitting:
        raise ConfigError(
            f"train.memory_budget={given:g}: is {room / GIB:.2f} GiB a rank, but with model.recompute="
            f"{_words(least)} it needs about {least.bytes / GIB:.2f}; raise it, or see docs/howto/memory.md: "
            "train.micro_batch_size, train.segment_tokens, parallel.zero_stage"
        )
    best, plain = fitting[0], next(choice for choice in found if not choice.recompute)
    model = replace(config.model, activation_checkpointing=False, recompute=best.recompute)
    said = (
        f"memory: model.recompute={_words(best)} for train.memory_budget={given:g}, {room / GIB:.2f} GiB a rank: "
        f"about {best.bytes / GIB:.2f} GiB, {plain.bytes / GIB:.2f} without"
    )
    return replace(config, model=model), said


def choices(config: PretrainConfig, vocab_size: int) -> Iterator[Choice]:
    """Every set, as it is predicted."""
    machine = _machine(config)
    layout = replace(layout_of(config), checkpointing=False)
    counts = {parts: _count(config, parts, vocab_size) for parts in (NOTHING, NORMS, PARTS)}
    for recompute, halves in CHOICES.items():
        whole = recompute == ("block",)
        if recompute and not whole and config.train.compile:
            # As `check_compile` has it.
            continue
        parts = zip(*(counts[half].parts for half in (*halves, NOTHING)), strict=True)
        chosen = replace(
            counts[NOTHING],
            parts=tuple(
                mixer if mixer.part == "mixer" else mlp if mlp.part == "mlp" else other for mixer, mlp, other in parts
            ),
        )
        size = sum(memory_bytes(chosen, replace(layout, checkpointing=whole), machine).values())
        yield Choice(recompute, size, sum(compute_seconds(chosen, machine, again=whole).values()))


def _count(config: PretrainConfig, parts: Parts, vocab_size: int) -> ModelCounts:
    """Of what runs through the model at once on a rank."""
    model = replace(config.model, activation_checkpointing=False, recompute=parts)
    return counter_of(replace(config, model=model), vocab_size).count(*at_once(config))


def _machine(config: PretrainConfig) -> Machine:
    """Rates tell sets apart and no more; memory as on this machine."""
    if _on_gpus(config):
        machine = read_cluster("h100").machine
        assert machine is not None
        return machine
    base = peak_resident_bytes() + PROGRAM
    return Machine("CPUs", memory=1.0, base=base, unused_kept=UNUSED_KEPT, unused_passing=UNUSED_PASSING)


def _memory(config: PretrainConfig) -> float:
    """Bytes of a rank's GPU, or its part of this machine's."""
    if config.runtime.cluster:
        raise ConfigError(
            f"train.memory_budget={config.train.memory_budget:g}: what memory the cluster at runtime.address has isn't "
            "known here; name bytes of a rank, as in train.memory_budget=60e9"
        )
    if _on_gpus(config):
        return float(torch.cuda.get_device_properties(0).total_memory)
    return psutil.virtual_memory().total / config.parallel.ranks


def _on_gpus(config: PretrainConfig) -> bool:
    return config.runtime.device != "cpu" and (torch.cuda.is_available() or bool(config.runtime.cluster))


def _words(choice: Choice) -> str:
    return f"[{','.join(choice.recompute)}]"
