"""The config of a conversion: one frozen dataclass per section, and one per stage of a recipe."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from seqtrain.convert.calibrate import Calibration
from seqtrain.data import DataConfig
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.mixers import MIXERS
from seqtrain.mixers.common.liger import Liger
from seqtrain.mixers.linearized_attention import MemoryConfig, recurrence_of
from seqtrain.models.families import is_servable, servable_targets
from seqtrain.runtime.settings import AUTO, CheckpointConfig, ParallelConfig, RuntimeConfig, TrackingConfig
from seqtrain.validation import FilePath, validate

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
POLICY = re.compile(r"none|(every|budget):([1-9]\d*)")


@dataclass(frozen=True)
class LayerConfig(MemoryConfig):
    """The layer that takes attention's place; Liger's three are fixed but for the window."""

    # A window without sinks costs more than all else (perplexity 191 instead of 63): it must be asked for with true.
    without_sinks: bool = False
    # together: every converted layer has window and memory; alternate: one has the memory alone, the next the window
    # with its sinks alone (SpikingBrain's alternation between layers).
    arrangement: Literal["together", "alternate"] = "together"


@dataclass(frozen=True)
class UpcycleConfig:
    """Experts in place of MLPs, each a copy of its layer's (SpikingBrain, arXiv 2509.05276)."""

    # Routed experts in every layer; 0: MLPs stay.
    experts: Count = 0
    # Routed experts that work on each token.
    experts_per_token: Positive = 2
    # True: one more works on every token.
    shared: bool = True


@dataclass(frozen=True)
class StageConfig:
    """One stage: what is trained, towards what, and for how long."""

    # transfer: each converted layer alone, given what its teacher's layer is given, towards what that layer puts out.
    # train: the whole model, towards its teacher's distribution, the text, or both. zeroth_order: the same by two
    # forward passes a step, in the memory of inference. calibrate: numbers in closed form, without training.
    kind: Literal["transfer", "train", "zeroth_order", "calibrate"] = "train"
    # What text it reads: that of `data`, or made-up facts that are asked for and passages that are copied later on.
    text: Literal["data", "facts"] = "data"
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
    # transfer, and what `hidden` weighs: what is minimized, the square error relative to the teacher's output token by
    # token, its mean, or its root's (norm, RADLADS).
    error: Literal["relative", "mean_square", "norm"] = "relative"
    # The layers, by number; empty: all that were converted (transfer, calibrate), or the model as a whole. What lies
    # below the lowest layer that is trained or not its teacher's runs once for both models, and not backward.
    layers: tuple[Count, ...] = ()
    # transfer: layers trained at one time; 0: all. Fewer take less memory, and the teacher runs again for each group.
    layers_at_once: Count = 0
    # calibrate: which numbers, see seqtrain/convert/calibrate.py. QuantVLA: temperature, output; Taylor-Calibrate:
    # timescale, heads.
    calibrations: tuple[Calibration, ...] = ()
    # zeroth_order: how far the weights are moved to either side.
    epsilon: Annotated[float, Field(gt=0)] = 1e-3
    # zeroth_order: tokens of a row that run at one time, with the state carried on; 0: all.
    segment: Count = 0
    # train: weight of the divergence KL(teacher | student) of the next token's distribution.
    kl: Rate = 0.0
    # train: weight of the cross-entropy of the text.
    ce: Rate = 0.0
    # train: weight of the error of the last hidden states.
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
    # The optimizer's rule: dct_adamw keeps of a matrix's moments `optimizer_rank` columns, so that stages that train
    # all weights need little more than these; see docs/optimizers.md.
    optimizer: Literal["adamw", "dct_adamw"] = "adamw"
    # dct_adamw: columns of a matrix's cosine transform that are kept.
    optimizer_rank: Positive = 128
    # Fraction of a matrix subtracted per step, times its learning rate.
    weight_decay: Rate = 0.0
    # Largest norm of a step's gradient; 0: no clipping. A transfer's layers are independent: 0.
    gradient_clipping: Rate = 0.0
    # True: activations are computed again in the backward pass instead of kept.
    activation_checkpointing: bool = False
    # What the teacher is held in; auto: bfloat16 on GPUs, else float32, which on a CPU takes no memory for what the
    # student shares untrained. int8, by torchao, of matrices alone, takes a fourth and rounds; see `weights` of
    # `seqtrain generate`.
    teacher: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    # Number format of matrix products; weights and the optimizer's state are float32 in both.
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class RecipeConfig:
    """How the model is trained back towards its teacher: stages by name, one after the other."""

    # The recipe's name, for the report.
    name: str = "none"
    # The stages by name, run one after the other.
    stages: Mapping[str, StageConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifyConfig:
    """What the new model is compared with its teacher on."""

    # Held-out texts by the name the report gives them: a text file, or python-prose or python-code, which come with
    # Python; empty leaves one out.
    texts: Mapping[str, FilePath] = field(default_factory=lambda: {"prose": "python-prose", "code": "python-code"})
    # Tokens of a text in one sequence.
    tokens: Annotated[int, Field(gt=1)] = 512
    # Sequences of a text at most.
    sequences: Positive = 4
    # Tokens back at which a passage is asked for again, as far as a text reaches.
    recall: tuple[Positive, ...] = (64, 128, 256, 512)
    # What teacher and student are to continue; empty: nothing.
    prompt: str = "The capital of France is"
    # Tokens the exported model generates while its cache is watched; 0: none.
    generate: Count = 64
    # Least part of the gap between the start (window and sinks) and the teacher that training must close on every text,
    # with each layer's error fallen and the memory of use; 0: no such checks.
    gap_closed: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """All options of `seqtrain convert`."""

    # Folder of a Hugging Face checkpoint (safetensors), or a GGUF file.
    source: FilePath = ""
    # What Source.sha256 must give for its weights; empty: anything.
    source_sha256: str = ""
    # What replaces softmax attention: a mixer, whose recurrence becomes a memory beside a window; or a family of models
    # that others serve (granitemoehybrid, qwen3_next, qwen3_5_text), whose recurrent layers take its place.
    target: str = "gated_delta_net"
    layer: LayerConfig = LayerConfig()
    upcycle: UpcycleConfig = UpcycleConfig()
    # Layers that keep softmax attention: none, every:K (the last of each K), budget:N (the N that matter most,
    # measured), a list of numbers from 0, or FILE.json, the layers.json of another conversion.
    keep: str | tuple[Count, ...] = "none"
    # budget: what decides which layers matter most. Of each layer alone, its own attention restored: the divergence it
    # removes (kl), the recall it gives back (recall), the mean of both relative to their largest (both), recall over
    # divergence (recall_per_kl, HALO); or how sharply the loss curves in its weights, without a student (trace, HAWQ).
    keep_score: Literal["kl", "recall", "both", "recall_per_kl", "trace"] = "both"
    # Number format of the weights.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Number format of a GGUF file that is written besides, for llama.cpp, where the target is granitemoehybrid.
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0"] = "none"
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
    seed: Count = 0


def targets() -> tuple[str, ...]:
    """Mixers that attention can be converted to: those that offer a recurrence, and Liger's layers as they are."""
    return tuple(name for name in MIXERS.names if MIXERS.get(name).recurrence is not None or is_liger(name))


def is_liger(target: str) -> bool:
    """Whether the target is a complete layer, not a memory next to a window."""
    return not is_servable(target) and issubclass(MIXERS.get(target), Liger)


def read_convert_config(config: DictConfig) -> ConvertConfig:
    """The typed config of a conversion, with the rules between its keys checked. Raises `ConfigError`."""
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    typed = validate(ConvertConfig, values)
    if typed.parallel.data == AUTO:
        # A stage has one sequence per step by default.
        typed = replace(typed, parallel=replace(typed.parallel, data=1))
    if not typed.source:
        raise ConfigError("source: is required; name a folder with config.json and safetensors, or a .gguf file")
    if typed.target not in targets() and not is_servable(typed.target):
        raise ConfigError(unknown_name("target", typed.target, (*targets(), *servable_targets())))
    if isinstance(typed.keep, str) and not (POLICY.fullmatch(typed.keep) or typed.keep.endswith(".json")):
        rule = "must be none, every:K, budget:N, a list of layers, as in [3,7,11], or a layers.json"
        raise ConfigError(f"keep={typed.keep}: {rule}")
    _check_layer(typed)
    _check_upcycling(typed)
    for name, stage in typed.recipe.stages.items():
        _check_stage(f"recipe.stages.{name}", stage)
    _check_ranks(typed)
    return typed


def _check_layer(config: ConvertConfig) -> None:
    """Raises `ConfigError` for the first rule between `layer` and `target` that is broken."""
    target, layer, liger = config.target, config.layer, is_liger(config.target)
    if is_servable(target):
        # The window is what recall is measured by, too.
        plain = replace(LayerConfig(), window=layer.window)
        if differing := [each.name for each in fields(layer) if getattr(layer, each.name) != getattr(plain, each.name)]:
            name = differing[0]
            rule = f"target={target} has layers of its own, without a window and sinks; leave it out"
            raise ConfigError(f"layer.{name}={getattr(layer, name)}: {rule}")
        return
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


def _check_upcycling(config: ConvertConfig) -> None:
    """Raises `ConfigError` where MLPs can't become experts."""
    upcycle = config.upcycle
    if not upcycle.experts:
        return
    key = f"upcycle.experts={upcycle.experts}"
    if is_servable(config.target):
        raise ConfigError(f"{key}: target={config.target} is written with MLPs; use 0, or a mixer as target")
    if upcycle.experts_per_token > upcycle.experts:
        raise ConfigError(f"upcycle.experts_per_token={upcycle.experts_per_token}: there are {key}")
    for name, stage in config.recipe.stages.items():
        if stage.trainable == "lora" and {"gate", "up", "down"} & set(stage.lora_targets):
            raise ConfigError(f"recipe.stages.{name}.lora_targets={list(stage.lora_targets)}: {key} leaves no MLPs")


def _check_ranks(config: ConvertConfig) -> None:
    """Raises `ConfigError` where the stages of a recipe can't be divided over the ranks."""
    parallel, stages = config.parallel, config.recipe.stages
    if stages and config.runtime.name == "inline" and parallel.ranks > 1:
        raise ConfigError(
            f"parallel.data={parallel.data} parallel.sequence={parallel.sequence}: runtime=inline is this process "
            "alone; use runtime=ray, or 1 for both"
        )
    if parallel.tensor > 1:
        raise ConfigError(f"parallel.tensor={parallel.tensor}: a teacher isn't divided over ranks; use 1")
    for name, stage in stages.items():
        whole = {"kind": "zeroth_order", "teacher": "int8"}
        if wrong := [key for key, value in whole.items() if vars(stage)[key] == value and parallel.zero_stage == 3]:
            key, why = wrong[0], "needs whole weights; use parallel.zero_stage=0, 1 or 2"
            raise ConfigError(f"recipe.stages.{name}.{key}={whole[key]}: {why}")
        if stage.sequence_ranks and parallel.ranks % stage.sequence_ranks:
            raise ConfigError(
                f"recipe.stages.{name}.sequence_ranks={stage.sequence_ranks}: must divide the number of ranks, "
                f"parallel.data x parallel.sequence = {parallel.ranks}"
            )


def _check_stage(key: str, stage: StageConfig) -> None:
    """Raises `ConfigError` for the first rule between a stage's keys that is broken."""
    losses = {"kl": stage.kl, "ce": stage.ce, "hidden": stage.hidden}
    given = [name for name, weight in losses.items() if weight]
    alone = stage.kind in ("transfer", "calibrate")
    if bool(stage.calibrations) != (stage.kind == "calibrate"):
        rule = "needs one" if stage.kind == "calibrate" else f"kind={stage.kind} has none; leave it out"
        raise ConfigError(f"{key}.calibrations={list(stage.calibrations)}: {rule}")
    if not (stage.lr_new or stage.lr or stage.kind == "calibrate"):
        raise ConfigError(f"{key}.lr={stage.lr}: lr_new and lr are both 0, which trains nothing; raise one")
    if not alone and not given:
        raise ConfigError(f"{key}.kl={stage.kl}: kl, ce and hidden are all 0, which leaves no loss; raise one")
    if alone and given:
        rule = f"kind={stage.kind} has no such loss; use 0, or kind=train"
        raise ConfigError(f"{key}.{given[0]}={losses[given[0]]}: {rule}")
    if alone and stage.trainable != "mixers":
        rule = f"kind={stage.kind} changes mixers; use mixers, or kind=train"
        raise ConfigError(f"{key}.trainable={stage.trainable}: {rule}")
    if stage.kind == "zeroth_order" and stage.sequence_ranks != 1:
        rule = "kind=zeroth_order runs a row in pieces, not on ranks; use 1, and segment"
        raise ConfigError(f"{key}.sequence_ranks={stage.sequence_ranks}: {rule}")
    if stage.segment and stage.kind != "zeroth_order":
        raise ConfigError(f"{key}.segment={stage.segment}: only kind=zeroth_order runs rows in pieces; use 0")
    if stage.kind == "transfer" and stage.gradient_clipping:
        raise ConfigError(f"{key}.gradient_clipping={stage.gradient_clipping}: would tie a transfer's layers; use 0")
    if stage.kind != "transfer" and stage.layers_at_once:
        raise ConfigError(f"{key}.layers_at_once={stage.layers_at_once}: only kind=transfer trains layers alone; use 0")
    if stage.trainable == "lora" and stage.layers:
        raise ConfigError(f"{key}.layers={list(stage.layers)}: trainable=lora is for all layers; leave it out")
    if stage.trainable == "lora" and not (stage.lora_targets and stage.lr):
        raise ConfigError(f"{key}.lora_targets={list(stage.lora_targets)}: needs matrices, and lr above 0")
