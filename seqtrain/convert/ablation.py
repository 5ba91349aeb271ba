"""A converted model without a part of its layers, and how far they see without their memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from seqtrain.mixers.common.liger import Liger, LigerConfig
from seqtrain.mixers.linearized_attention import LinearizedAttention
from seqtrain.mixers.streaming_attention import StreamingAttention
from seqtrain.models import LanguageModel

Part = Literal["memory", "window"]
PARTS: tuple[Part, ...] = ("memory", "window")


class Seen(NamedTuple):
    """What the softmax of a layer reaches: the last `window` tokens and a document's first `sinks`."""

    window: int
    sinks: int


Converted = Liger | LinearizedAttention | StreamingAttention


def converted_mixers(model: LanguageModel) -> list[Converted]:
    """Those that took attention's place."""
    return [block.mixer for block in model.blocks if isinstance(block.mixer, Converted)]


def seen_by(model: LanguageModel) -> Seen:
    """The widest reach of the converted layers' softmax."""
    configs = [mixer.config for mixer in converted_mixers(model)]
    sinks = [config.sinks for config in configs if not isinstance(config, LigerConfig)]
    return Seen(max((config.window for config in configs), default=0), max(sinks, default=0))


@contextmanager
def switched_off(model: LanguageModel, part: Part) -> Iterator[bool]:
    """`model` without the `memory` or the `window` of its converted layers; whether there are both to choose from."""
    mixers = converted_mixers(model)
    holders: dict[Part, list[Converted]] = {
        "memory": [mixer for mixer in mixers if not isinstance(mixer, StreamingAttention)],
        "window": [mixer for mixer in mixers if mixer.config.window],
    }
    found = holders[part] if all(holders.values()) else []
    for mixer in found:
        mixer.without = part
    try:
        yield bool(found)
    finally:
        for mixer in found:
            mixer.without = ""
