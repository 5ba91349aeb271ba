"""Recipes: in which stages a converted model is trained back towards its teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from seqtrain.errors import ConfigError
from seqtrain.validation import validate

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class StageConfig:
    """One stage: what is trained, towards what, and for how long."""

    # transfer: each converted layer alone, given what its teacher's layer is given, towards what that layer puts out.
    # train: the whole model, towards its teacher's distribution, the text, or both.
    kind: Literal["transfer", "train"] = "train"
    # What changes: the converted layers' mixers; LoRA adapters (and what conversion added); or every weight.
    trainable: Literal["mixers", "lora", "all"] = "mixers"
    # Highest learning rate of the parameters that conversion added: gates, feature maps, the memory's weight.
    # 0 leaves them.
    lr_new: Rate = 1e-3
    # Highest learning rate of all else that is trained. 0 leaves it.
    lr: Rate = 0.0
    # Optimizer steps.
    steps: Positive = 100
    # Tokens in a sequence.
    sequence_length: Positive = 512
    # Sequences in a step, all ranks together.
    batch_size: Positive = 1
    # Most sequences per rank in one pass.
    micro_batch_size: Positive = 1
    # Sequence-parallel ranks; must divide the number of ranks, parallel.data x parallel.sequence. 0: all of them.
    sequence_ranks: Count = 1
    # transfer: what is minimized, the error relative to the teacher's output token by token, or its mean square.
    error: Literal["relative", "mean_square"] = "relative"
    # transfer: the layers, by number; empty: all that were converted.
    layers: tuple[Count, ...] = ()
    # transfer: layers trained at one time; 0: all. With fewer, what enters the next ones is kept on disk.
    layers_at_once: Count = 0
    # train: weight of the divergence KL(teacher | student) of the next token's distribution.
    kl: Rate = 0.0
    # train: weight of the cross-entropy of the text.
    ce: Rate = 0.0
    # train: weight of the relative square error of the last hidden states.
    hidden: Rate = 0.0
    # train: logits are divided by it in the KL.
    temperature: Annotated[float, Field(gt=0)] = 1.0
    # lora: rank of an adapter.
    lora_rank: Positive = 8
    # lora: an adapter's product is multiplied with alpha / rank.
    lora_alpha: Positive = 16
    # lora: the matrices that have an adapter.
    lora_targets: tuple[Literal["q", "k", "v", "out", "gate", "up", "down"], ...] = ("q", "k", "v")
    # Fraction of the steps over which rates rise; then they fall in half a cosine.
    warmup_fraction: Fraction = 0.1
    # Rates of the last step as a fraction of the highest.
    final_lr_ratio: Fraction = 0.1
    # Decay rates of Adam's means, per step.
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    # Fraction of a matrix subtracted per step, times its learning rate.
    weight_decay: Rate = 0.0
    # Largest norm of a step's gradient; 0: no clipping. A transfer's layers are independent: 0.
    gradient_clipping: Rate = 0.0
    # True: activations are computed again in the backward pass instead of kept.
    activation_checkpointing: bool = False
    # Number format of matrix products; weights and the optimizer's state are float32 in both.
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class RecipeConfig:
    """How the model is trained back towards its teacher: stages by name, one after the other."""

    # The recipe's name, for the report.
    name: str = "none"
    # The stages by name, run one after the other.
    stages: Mapping[str, StageConfig] = field(default_factory=dict)


def read_recipe(values: Mapping[str, Any]) -> RecipeConfig:
    """The typed recipe of plain values. Raises `ConfigError`."""
    stages = values.get("stages") or {}
    if not isinstance(stages, Mapping):
        raise ConfigError("recipe.stages: must be stages by name, as in stages: {transfer: {...}, kl: {...}}")
    recipe = validate(RecipeConfig, {**values, "stages": {}}, prefix="recipe.")
    read = {}
    for name, stage in stages.items():
        key = f"recipe.stages.{name}"
        if not isinstance(stage, Mapping):
            raise ConfigError(f"{key}={stage}: must be the keys of a stage")
        read[str(name)] = validate(StageConfig, stage, prefix=f"{key}.")
        _check(key, read[str(name)])
    return RecipeConfig(recipe.name, read)


def _check(key: str, stage: StageConfig) -> None:
    """Raises `ConfigError` for the first rule between a stage's keys that is broken."""
    losses = {"kl": stage.kl, "ce": stage.ce, "hidden": stage.hidden}
    given = [name for name, weight in losses.items() if weight]
    if not (stage.lr_new or stage.lr):
        raise ConfigError(f"{key}.lr={stage.lr}: lr_new and lr are both 0, which trains nothing; raise one")
    if stage.kind == "train" and not given:
        raise ConfigError(f"{key}.kl={stage.kl}: kl, ce and hidden are all 0, which leaves no loss; raise one")
    if stage.kind == "transfer" and given:
        raise ConfigError(f"{key}.{given[0]}={losses[given[0]]}: kind=transfer has no such loss; use 0, or kind=train")
    if stage.kind == "transfer" and stage.trainable != "mixers":
        raise ConfigError(f"{key}.trainable={stage.trainable}: kind=transfer trains mixers; use mixers, or kind=train")
    if stage.kind == "transfer" and stage.gradient_clipping:
        raise ConfigError(f"{key}.gradient_clipping={stage.gradient_clipping}: would tie a transfer's layers; use 0")
    if stage.kind == "train" and (stage.layers or stage.layers_at_once):
        raise ConfigError(f"{key}.layers: kind=train trains the model as a whole; leave layers and layers_at_once out")
    if stage.trainable == "lora" and not (stage.lora_targets and stage.lr):
        raise ConfigError(f"{key}.lora_targets={list(stage.lora_targets)}: needs matrices, and lr above 0")
