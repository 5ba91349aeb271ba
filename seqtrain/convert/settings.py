"""The config of a conversion: one frozen dataclass per section."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from seqtrain.convert.recipe import RecipeConfig, read_recipe
from seqtrain.data import DataConfig
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.mixers import MIXERS
from seqtrain.mixers.common.liger import Liger
from seqtrain.mixers.linearized_attention import recurrence_of
from seqtrain.runtime.settings import AUTO, CheckpointConfig, ParallelConfig, RuntimeConfig, TrackingConfig
from seqtrain.validation import FilePath, validate

POLICY = re.compile(r"none|(every|budget):([1-9]\d*)")


@dataclass(frozen=True)
class LayerConfig:
    """The layer that takes attention's place; Liger's three are fixed but for the window."""

    # Tokens under the softmax, the query's own included; 0: none, a purely recurrent layer.
    window: Annotated[int, Field(ge=0)] = 64
    # First tokens of a document that stay under the softmax.
    sinks: Annotated[int, Field(ge=0)] = 4
    # A window without sinks costs more than all else (perplexity 191 instead of 63): it must be asked for with true.
    without_sinks: bool = False
    # How window and memory are joined; auto: under one denominator where the memory has a normalizer, else as a sum;
    # norms: each normalized by itself, then added (SpikingBrain).
    combine: Literal["auto", "denominator", "sum", "norms"] = "auto"
    # Weight of the memory before training: a factor on its normalizer, or its fraction of the sum.
    memory_weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Rank of the matrix that makes gla's forget gate.
    gate_rank: Annotated[int, Field(gt=0)] = 16
    # True: gla's forget gate is 1 - key, without a matrix (SpikingBrain's tied gate).
    tied_gate: bool = False
    # Slots of gsa per head.
    slots: Annotated[int, Field(gt=0)] = 64
    # together: every converted layer has window and memory; alternate: one has the memory alone, the next the window
    # with its sinks alone (SpikingBrain's alternation between layers).
    arrangement: Literal["together", "alternate"] = "together"


@dataclass(frozen=True)
class VerifyConfig:
    """What the new model is compared with its teacher on."""

    # Held-out texts by the name the report gives them: a text file, or python-prose or python-code, which come with
    # Python; empty leaves one out.
    texts: Mapping[str, FilePath] = field(default_factory=lambda: {"prose": "python-prose", "code": "python-code"})
    # Tokens of a text in one sequence.
    tokens: Annotated[int, Field(gt=1)] = 512
    # Sequences of a text at most.
    sequences: Annotated[int, Field(gt=0)] = 4
    # What teacher and student are to continue; empty: nothing.
    prompt: str = "The capital of France is"
    # Tokens the exported model generates while its cache is watched; 0: none.
    generate: Annotated[int, Field(ge=0)] = 64
    # Least part of the gap between the start (window and sinks) and the teacher that training must close on every text,
    # with each layer's error fallen and the memory of use; 0: no such checks.
    gap_closed: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """All options of `seqtrain convert`."""

    # Folder of a Hugging Face checkpoint (safetensors), or a GGUF file.
    source: FilePath = ""
    # What Source.sha256 must give for its weights; empty: anything.
    source_sha256: str = ""
    # What replaces softmax attention.
    target: str = "gated_delta_net"
    layer: LayerConfig = LayerConfig()
    # Layers that keep softmax attention: none, every:K (the last of each K), budget:N (the N that matter most,
    # measured), a list of numbers from 0, or FILE.json, the layers.json of another conversion.
    keep: str | tuple[Annotated[int, Field(ge=0)], ...] = "none"
    # Number format of the weights.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    recipe: RecipeConfig
    # What the recipe's stages train on; the tokenizer is the source's.
    data: DataConfig
    # Ranks that train; stages may use some of them as sequence-parallel ranks.
    parallel: ParallelConfig
    runtime: RuntimeConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    verify: VerifyConfig
    # Folder of the report; the model is written to `model` in it.
    output_dir: FilePath
    # Folders of other conversions of the same source, whose figures are to stand in this one's tables.
    beside: tuple[str, ...] = ()
    # Of the new parameters, and of the order of the data.
    seed: Annotated[int, Field(ge=0)] = 0


def targets() -> tuple[str, ...]:
    """What attention can be converted to: mixers that offer a recurrence, and Liger's layers as they are."""
    return tuple(name for name in MIXERS.names if MIXERS.get(name).recurrence is not None or is_liger(name))


def is_liger(target: str) -> bool:
    """Whether the target is a complete layer, not a memory next to a window."""
    return issubclass(MIXERS.get(target), Liger)


def read_convert_config(config: DictConfig) -> ConvertConfig:
    """The typed config of a conversion, with the rules between its keys checked. Raises `ConfigError`."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    recipe = read_recipe(values.pop("recipe", {}))
    typed = replace(validate(ConvertConfig, values | {"recipe": {"name": recipe.name}}), recipe=recipe)
    if typed.parallel.data == AUTO:
        # A stage has one sequence per step by default.
        typed = replace(typed, parallel=replace(typed.parallel, data=1))
    if not typed.source:
        raise ConfigError("source: is required; name a folder with config.json and safetensors, or a .gguf file")
    if typed.target not in targets():
        raise ConfigError(unknown_name("target", typed.target, targets()))
    if isinstance(typed.keep, str) and not (POLICY.fullmatch(typed.keep) or typed.keep.endswith(".json")):
        rule = "must be none, every:K, budget:N, a list of layers, as in [3,7,11], or a layers.json"
        raise ConfigError(f"keep={typed.keep}: {rule}")
    _check_layer(typed)
    _check_ranks(typed)
    return typed


def _check_layer(config: ConvertConfig) -> None:
    """Raises `ConfigError` for the first rule between `layer` and `target` that is broken."""
    target, layer, liger = config.target, config.layer, is_liger(config.target)
    if liger and layer.window == 0:
        raise ConfigError(
            f"layer.window=0: target={target} averages a window with a recurrence: layer.window must be at least 1"
        )
    if liger and layer.arrangement == "alternate":
        raise ConfigError(f"layer.arrangement=alternate: target={target} has both parts in one layer")
    if liger:
        return
    if layer.tied_gate and recurrence_of(target).tied is None:
        raise ConfigError(f"layer.tied_gate=true: only applies to target=gla, not target={target}")
    if layer.arrangement == "alternate" and not layer.window:
        raise ConfigError("layer.window=0: layer.arrangement=alternate needs a window for every other layer")
    if layer.window and not layer.sinks and not layer.without_sinks:
        raise ConfigError(
            "layer.sinks=0: a window that loses the first tokens breaks most models; use layer.sinks=4, or "
            "layer.without_sinks=true if that is what you want"
        )


def _check_ranks(config: ConvertConfig) -> None:
    """Raises `ConfigError` where the stages of a recipe can't be divided over the ranks."""
    parallel, stages = config.parallel, config.recipe.stages
    if stages and config.runtime.name == "inline" and parallel.ranks > 1:
        raise ConfigError(
            f"parallel.data={parallel.data} parallel.sequence={parallel.sequence}: runtime=inline is this process "
            "alone; use runtime=ray, or 1 for both"
        )
    if stages and parallel.zero_stage == 3:
        raise ConfigError("parallel.zero_stage=3: a teacher's weights are not divided over ranks; use 0, 1 or 2")
    for name, stage in stages.items():
        if stage.sequence_ranks and parallel.ranks % stage.sequence_ranks:
            raise ConfigError(
                f"recipe.stages.{name}.sequence_ranks={stage.sequence_ranks}: must divide the number of ranks, "
                f"parallel.data x parallel.sequence = {parallel.ranks}"
            )
