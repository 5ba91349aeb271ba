"""The keys under `model.`, and which configs mixers have where nothing is said of them."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from seqtrain.encoders import ENCODERS
from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS, Mixer
from seqtrain.models.feed_forward import Activation, RouterConfig
from seqtrain.models.shared import SharedConfig
from seqtrain.models.spark import SparkConfig

Norms = Literal["pre", "post", "both", "stream"]
# Parts of a block whose activations can be computed again.
Recomputed = Literal["norm", "mlp", "projection", "block"]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ModelConfig:
    """The keys under `model.`; the files in `conf/model/` hold one ready choice each."""

    # decoder: tokens see those before them (a language model); encoder: all tokens of their document, by the mixers'
    # non-causal forms, or both directions where there is none. An encoder carries no state and generates nothing.
    kind: Literal["decoder", "encoder"] = "decoder"
    # Rows of embedding and head, at least as many as the tokenizer has ids; 0: as many.
    vocab_size: Annotated[int, Field(ge=0)] = 0
    # Names of mixers (files in seqtrain/mixers/), repeated over the depth; none: a layer without one.
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("gated_delta_net",)
    # Number of blocks.
    depth: Annotated[int, Field(gt=0)] = 12
    # Channels of the residual stream.
    width: Annotated[int, Field(gt=0)] = 768
    # Heads of every mixer; must divide width.
    heads: Annotated[int, Field(gt=0)] = 12
    # Tokens in the groups each layer is confined to, repeated over the depth; 0: the whole sequence.
    groups: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    # How many tokens before a document's start each layer's groups begin, repeated over the depth: what layers with
    # others have apart meets in these (LION's shifted windows).
    group_shift: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    # Points along each axis of the grid whose points tokens are, by their ids: before the first layer each is then told
    # of the points around it (LION, spatial descriptor); 0: tokens are no points.
    descriptor: Annotated[int, Field(ge=0, le=256)] = 0
    # Hidden channels of the MLP over width, rounded to a multiple of 8 channels.
    mlp_ratio: Annotated[float, Field(gt=0)] = 2.6667
    # Hidden channels of the MLP; 0: as mlp_ratio says.
    mlp_width: Annotated[int, Field(ge=0)] = 0
    # What follows the mixer of each layer, repeated over the depth: an MLP, routed experts (moe), an MLP that keeps few
    # of its channels (spark: half as many hidden channels again, so as many weights as an MLP), or nothing (none).
    mlps: Annotated[tuple[Literal["mlp", "moe", "spark", "none"], ...], Field(min_length=1)] = ("mlp",)
    spark: SparkConfig = field(default_factory=SparkConfig)
    # What MLPs and experts apply to their hidden channels; relu2 is the square of relu.
    activation: Activation = "silu"
    # True: it is applied to one half, which multiplies the other (SwiGLU); False: to all.
    mlp_gated: bool = True
    # True: matrices of the MLP have biases.
    mlp_bias: bool = False
    # True: SwiGLU in the epilogue of its product, one Triton kernel on GPUs, which moves 3 numbers a hidden channel and
    # token in place of 5 (CODA); on CPUs as without.
    mlp_epilogue: bool = False
    # Factor on what an MLP applies its activation to.
    mlp_gate_scale: Annotated[float, Field(gt=0)] = 1.0
    # Factor on what leaves an MLP.
    mlp_out_scale: Annotated[float, Field(gt=0)] = 1.0
    # Routed experts in a mixture-of-experts layer; 0: none. All layers have them unless mlps says which.
    experts: Annotated[int, Field(ge=0)] = 0
    # Experts that work on each token.
    experts_per_token: Annotated[int, Field(gt=0)] = 2
    # Hidden channels of an expert; 0: of the MLP.
    expert_width: Annotated[int, Field(ge=0)] = 0
    # Hidden channels of the expert that works on every token; 0: none.
    shared_expert_width: Annotated[int, Field(ge=0)] = 0
    # Channels that experts work on, by a projection before and after them; 0: of the residual stream.
    expert_latent: Annotated[int, Field(ge=0)] = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    # Mean spikes per value at the input of every projection of mixers, MLPs and experts (k of SpikingBrain, which has
    # 3); 0: no spikes, plain activations.
    spike_rate: Annotated[float, Field(ge=0)] = 0.0
    shared: SharedConfig = field(default_factory=SharedConfig)
    # True: the head uses the embedding's matrix, which saves vocab * width parameters.
    tie_embeddings: bool = True
    # True: a block's activations are computed again in the backward pass instead of kept.
    activation_checkpointing: bool = False
    # Parts of a block that are computed again instead: norms with activations and gates (norm: all but products and
    # operators), the MLP or experts (mlp), a mixer's projections and convolutions (projection: all but its operators);
    # block: as activation_checkpointing.
    recompute: tuple[Recomputed, ...] = ()
    # In which number format the float32 that enters these parts is kept: in bfloat16 it takes half as much memory, and
    # gradients are those of rounded inputs.
    recompute_inputs: Literal["float32", "bfloat16"] = "float32"
    # Tokens whose logits exist at one time in the loss.
    loss_chunk: Annotated[int, Field(gt=0)] = 1024
    # Where each layer normalises, repeated over the depth: what enters mixer and MLP (pre), what leaves them (post), or
    # the residual stream itself before each of them (stream).
    norms: Annotated[tuple[Norms, ...], Field(min_length=1)] = ("pre",)
    # Added to the mean square in the norms of the residual stream.
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    # True: these norms multiply by 1 + weight (Gemma).
    norm_zero_centered: bool = False
    # Factors on embeddings, on what each mixer and MLP adds, and on logits.
    embedding_scale: Annotated[float, Field(gt=0)] = 1.0
    residual_scale: Annotated[float, Field(gt=0)] = 1.0
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    # Factors of each layer's sums, repeated over the depth: on the stream and on what the mixer adds, on the stream and
    # on what the MLP adds (alpha and beta of DeepNorm).
    sum_scales: Annotated[tuple[tuple[Positive, Positive, Positive, Positive], ...], Field(min_length=1)] = (
        (1.0, 1.0, 1.0, 1.0),
    )
    # What logits stay below in size, softly (Gemma 2); 0: unbounded.
    logit_cap: Annotated[float, Field(ge=0)] = 0.0
    # Standard deviation of initial weights; those that write to the residual stream have it over sqrt(2 * depth).
    initializer_range: Annotated[float, Field(gt=0)] = 0.02

    @property
    def recomputed(self) -> frozenset[str]:
        """The parts of a block that are computed again; of the whole block, `block` alone."""
        whole = self.activation_checkpointing or "block" in self.recompute
        return frozenset(["block"]) if whole else frozenset(self.recompute)

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return self.mlp_width or max(8, round(self.mlp_ratio * self.width / 8) * 8)

    def mixer(self, index: int) -> str:
        """The name of layer `index`'s mixer."""
        return self.layers[index % len(self.layers)]

    @property
    def mixers(self) -> tuple[str, ...]:
        """The names of all mixers, in the order in which layers first have them."""
        shared = (self.shared.mixer,) if any(self.shared.layers) else ()
        return tuple(name for name in dict.fromkeys((*self.layers, *shared)) if name != "none")

    def mlp(self, index: int) -> str:
        """What follows it."""
        kinds = ("moe",) if self.experts and self.mlps == ("mlp",) else self.mlps
        return kinds[index % len(kinds)]

    def scales(self, index: int) -> tuple[float, float, float, float]:
        """The factors of its two sums: on stream and mixer, on stream and MLP."""
        stream, mixer, stream_again, mlp = self.sum_scales[index % len(self.sum_scales)]
        return stream, mixer * self.residual_scale, stream_again, mlp * self.residual_scale

    @property
    def period(self) -> int:
        """After so many layers they begin anew."""
        patterns = (
            self.layers,
            self.groups,
            self.group_shift,
            self.mlps,
            self.norms,
            self.sum_scales,
            self.shared.layers,
        )
        return math.lcm(*map(len, patterns))


def default_config(mixer: str) -> Any:
    """The `Config` of the mixer of that name, all fields as they are by default. Raises `ConfigError`."""
    cls = mixer_class(mixer)
    try:
        return cls.Config()
    except TypeError as error:
        raise ConfigError(f"mixer.{mixer}: has no defaults ({error}); write conf/mixer/{mixer}.yaml") from error


def mixer_class(name: str) -> type[Mixer]:
    """The mixer that layers called `name` have: what comes before a dot, as in `attention.local`. Raises `ConfigError`.

    So layers of one mixer can have configs of their own. Those of encoders only are in a folder of theirs.
    """
    kind = name.partition(".")[0]
    return ENCODERS.get(kind) if kind in ENCODERS.names else MIXERS.get(kind)
