"""The networks of a conversion: the teacher as a `LanguageModel` with softmax mixers, its student, and what stays."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.convert.settings import POLICY, ConvertConfig, is_liger
from seqtrain.convert.sources import Source
from seqtrain.errors import ConfigError
from seqtrain.files import Manifest
from seqtrain.mixers import MIXERS, WHOLE
from seqtrain.mixers.linearized_attention import MemoryConfig
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.sequence import SequenceContext

FULL, WINDOWED = "attention", "sliding_attention"
LINEARIZED, STREAMING = "linearized_attention", "streaming_attention"


@dataclass(frozen=True)
class Architecture:
    """All that makes a network but its weights. `model.layers` names the mixer of every layer."""

    model: ModelConfig
    mixers: Mapping[str, Any]
    vocab_size: int

    def build(self) -> LanguageModel:
        """The network on the meta device, without memory. Raises `ConfigError`."""
        with torch.device("meta"):
            return LanguageModel(self.model, self.mixers, self.vocab_size)


def architecture_of(source: Source) -> Architecture:
    """The teacher. Raises `ConfigError` for what `LanguageModel` has no counterpart of."""
    config, family = source.config, source.family
    for key, allowed in {"hidden_act": "silu", **family.must_be}.items():
        if (came := getattr(config, key)) != allowed:
            raise ConfigError(f"source={source.path}: {key}={came} can't be converted; it must be {allowed}")
    heads, groups, depth = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    if groups < 1 or heads % groups:
        raise ConfigError(f"source={source.path}: num_key_value_heads={groups} must divide num_attention_heads={heads}")
    base, stretch, amplitude = rotation(source)
    attention = {
        "query_group": heads // groups,
        "rope_base": base,
        "rope_stretch": stretch,
        "rope_amplitude": amplitude,
        "qk_norm": family.qk_norm,
        "norm_eps": config.rms_norm_eps,
        # Some families' configs have no such key; in others it may be null.
        "head_width": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "qkv_bias": family.qkv_bias,
    }
    layers = _layers(config, depth)
    own = {FULL: {}, WINDOWED: {"window": config.sliding_window}} if WINDOWED in layers else {FULL: {}}
    mixers = {name: MIXERS.get(name).Config(**attention, **own[name]) for name in own if name in layers}
    model = ModelConfig(
        layers=layers,
        depth=depth,
        width=config.hidden_size,
        heads=heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        tie_embeddings=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
    )
    if model.hidden != config.intermediate_size:
        raise ConfigError(f"source={source.path}: intermediate_size={config.intermediate_size} must be a multiple of 8")
    return Architecture(model, mixers, config.vocab_size)


def _layers(config: Any, depth: int) -> tuple[str, ...]:
    """The softmax mixer of each layer: a model's own sliding windows stay what they are."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        return ((WINDOWED if windowed else FULL),) * depth
    return tuple(WINDOWED if kind == "sliding_attention" else FULL for kind in kinds)


def rotation(source: Source) -> tuple[float, tuple[float, ...], float]:
    """Base, factors on the wavelengths (none for 1 everywhere), and factor on queries and keys of the rotation."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = source.config
    rope = config.rope_parameters
    base, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"source={source.path}: partial_rotary_factor={rope['partial_rotary_factor']} must be 1")
    if kind == "default":
        return base, source.rope_stretch, 1.0
    # The other kinds change the rotation of what was seen before when a text gets longer.
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(f"source={source.path}: rope_type={kind} can't be converted; linear, llama3, yarn can")
    if source.rope_stretch:
        raise ConfigError(f"source={source.path}: has rope_freqs beside rope_type={kind}; one of both can be converted")
    rates, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    plain = base ** (-torch.arange(len(rates), dtype=torch.float64) / len(rates))
    return base, tuple((plain / rates.double()).tolist()), float(amplitude)


@dataclass(frozen=True)
class LayerChoice(Manifest):
    """`layers.json`: the layers that keep softmax attention, all mixers' names, and the scores of the choice."""

    error = ConfigError
    remedy = "keep takes the layers.json of a conversion, or an object with keep, a list of layers from 0"

    keep: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    layers: list[str] | None = None
    importance: list[float] | None = None


def kept_layers(
    keep: str | tuple[int, ...], depth: int, importance: Callable[[], list[float]]
) -> tuple[tuple[int, ...], list[float] | None]:
    """The numbers of the layers that stay, rising, and each layer's importance where it was measured.

    `keep`: as `ConvertConfig.keep`. `importance`: measures each layer, called for a budget only. Raises `ConfigError`.
    """
    scores, shown = None, keep if isinstance(keep, str) else sorted(keep)
    if not isinstance(keep, str):
        kept = keep
    elif keep.endswith(".json"):
        choice = LayerChoice.read(Path(keep).expanduser())
        if choice.layers and len(choice.layers) != depth:
            raise ConfigError(f"keep={keep}: is of a model with {len(choice.layers)} layers, not {depth}")
        kept, scores = choice.keep, choice.importance
    elif keep == "none":
        return (), None
    else:
        matched = POLICY.fullmatch(keep)
        assert matched is not None, keep
        number = int(matched[2])
        kept = tuple(range(number - 1, depth, number) if matched[1] == "every" else range(number))
    if beyond := [index for index in kept if index >= depth]:
        many = isinstance(keep, str) and keep.startswith("budget:")
        what = f"the model has {depth} layers" if many else f"the model has layers 0 to {depth - 1}, not {beyond[0]}"
        raise ConfigError(f"keep={shown}: {what}")
    if len(set(kept)) == depth:
        raise ConfigError(f"keep={shown}: leaves no layer to convert; keep fewer than {depth}")
    if isinstance(keep, str) and keep.startswith("budget:"):
        scores = measured = importance()
        kept = tuple(sorted(range(depth), key=lambda index: (-measured[index], index))[: len(kept)])
    return tuple(sorted(set(kept))), scores


def layers_that_stay(layers: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the layers that are still softmax attention, of the mixers' names."""
    return tuple(index for index, name in enumerate(layers) if name in (FULL, WINDOWED))


def write_layers(file: Path, layers: Sequence[str], importance: list[float] | None) -> None:
    """Writes what was chosen, for people and for `keep=FILE.json`."""
    LayerChoice(layers_that_stay(layers), list(layers), importance).write(file)


def student_of(teacher: Architecture, config: ConvertConfig, kept: Collection[int]) -> Architecture:
    """`teacher` with the target's layers everywhere but in `kept`. Raises `ConfigError`."""
    layer, softmax = config.layer, next(iter(teacher.mixers.values()))
    # A layer that never saw further than its own window has no use for a longer one.
    window = layer.window
    if WINDOWED in teacher.mixers:
        window = min(window, teacher.mixers[WINDOWED].window)
    options: dict[str, dict[str, Any]]
    memory = {"memory": config.target} | {field.name: getattr(layer, field.name) for field in fields(MemoryConfig)}
    if is_liger(config.target):
        options = {config.target: {"window": window}}
    elif layer.arrangement == "alternate":
        options = {LINEARIZED: memory | {"window": 0}, STREAMING: {"window": window, "sinks": layer.sinks}}
    else:
        options = {LINEARIZED: memory | {"window": window}}
    names = cycle(options)
    layers = tuple(old if index in kept else next(names) for index, old in enumerate(teacher.model.layers))
    mixers = {**teacher.mixers, **{name: _taking_over(softmax, name, own) for name, own in options.items()}}
    used = {each: mixers[each] for each in sorted(set(layers))}
    return Architecture(replace(teacher.model, layers=layers), used, teacher.vocab_size)


@torch.no_grad()
def layers_alone(
    teacher: LanguageModel, x: Tensor, layers: range, sequence: SequenceContext = WHOLE
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each of `layers` its number, what its mixer is given, and what that puts out, both `[B,T,D]`.

    `x`: int64 `[B,T]`, tokens, or what enters the first of `layers`, float `[B,T,D]`.
    """
    x = x if x.is_floating_point() else teacher.embedding(x)
    for index in layers:
        block: Any = teacher.blocks[index]
        given = block.mixer_norm(x)
        out, _ = block.mixer(given, sequence=sequence)
        yield index, given, out
        if index != layers[-1]:
            x = x + out
            x = x + block.mlp(block.mlp_norm(x))


def _taking_over(softmax: Any, name: str, options: dict[str, Any]) -> Any:
    """The config of mixer `name` with the projections of `softmax`, a config too, and `options` of its own."""
    cls = MIXERS.get(name).Config
    shared = {field.name for field in fields(cls)} & {field.name for field in fields(softmax)}
    return cls(**{field: getattr(softmax, field) for field in shared - set(options)}, **options)
