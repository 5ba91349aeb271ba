"""What a family says of itself, and what families share: rotation, softmax layers, MLPs, experts."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.errors import ConfigError
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.mixers.gated_delta_net import GatedDeltaNet
from seqtrain.models.architecture import Architecture
from seqtrain.models.config import ModelConfig
from seqtrain.models.feed_forward import MLP, MoE, RouterConfig
from seqtrain.models.language_model import LanguageModel

# Rows of a tensor: all of them, some, or some in an order of their own.
Rows = slice | Tensor | None


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a file that are rows of a parameter; several pieces make up what is fused on either side.

    `theirs`, `ours`: names. `expert`: which of the parameter's matrices, where it holds one for each expert.
    `lifted`: the file's tensor has a dimension of size 1 more, in the middle (a convolution's). `shape`: what it has
    where the parameter holds its numbers one after the other; empty: the parameter's.
    """

    theirs: str
    ours: str
    our_rows: Rows = None
    their_rows: Rows = None
    expert: int | None = None
    lifted: bool = False
    shape: tuple[int, ...] = ()

    def part_of(self, parameter: Tensor) -> Tensor:
        """The rows of the parameter, in the file's shape; a view of it where rows are a slice."""
        rows = parameter if self.expert is None else parameter[self.expert]
        rows = rows if self.our_rows is None else rows[self.our_rows]
        rows = rows.view(self.shape) if self.shape else rows
        return rows.unsqueeze(1) if self.lifted else rows

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Gives these rows of the parameter the rows of a file's tensor."""
        value = value if self.their_rows is None else value[self.their_rows]
        value = value.flatten() if self.shape else value
        target = parameter if self.expert is None else parameter[self.expert]
        target[slice(None) if self.our_rows is None else self.our_rows] = (
            value.squeeze(1) if self.lifted else value
        ).to(target.dtype)

    def read(self, parameter: Tensor, value: Tensor) -> None:
        """The reverse: gives a file's tensor these rows of the parameter."""
        value[slice(None) if self.their_rows is None else self.their_rows] = self.part_of(parameter).to(value.dtype)


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`. A subclass says what network a config means, and where each tensor belongs.

    `carried`: beginnings of names of tensors that transformers' own class ignores (multi-token prediction, vision):
    they are kept as they are and written back. `ignored`: ends of names of tensors that follow from the config.
    `renamed`: parts of names that files have for those in the table, which are transformers' own. `unadapted`: ends of
    names of modules whose adapters PEFT refuses or transformers does not see.
    """

    carried: tuple[str, ...] = ()
    # Old files hold the rotation's rates.
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    # The key of config.json whose object describes the text model of a larger one; empty: the config is the model's.
    nested: str = field(default="", kw_only=True)
    renamed: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    unadapted: tuple[str, ...] = field(default=(), kw_only=True)
    # Whether a Transformer can be converted to it, see `hybrid_of`.
    target: bool = field(default=False, kw_only=True)

    def canonical(self, name: str) -> str:
        """The table's name of a tensor that a file calls `name`."""
        for theirs, known in self.renamed:
            name = name.replace(theirs, known)
        return name

    def text_config(self, config: Any) -> Any:
        """The part of transformers' config that describes the text model."""
        return getattr(config, self.nested) if self.nested else config

    def fitted(self, places: dict[str, list[Piece]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """`places`, the pieces of each tensor, as a file with these `shapes` has them where files differ."""
        return places

    def architecture(self, config: Any, where: object) -> Architecture:
        """The network that transformers' `config` describes; `where` it was found. Raises `ConfigError`."""
        raise NotImplementedError

    def config_of(self, model: LanguageModel) -> dict[str, Any]:
        """The keys of a config that describes `model`, as near as this family comes. Raises `ConfigError` for none."""
        raise ConfigError("no model but one of this family can be exported as it")

    def hybrid_of(self, teacher: Architecture, kept: Collection[int]) -> Architecture:
        """The network of this family nearest to `teacher`, of softmax attention and MLPs, which keeps that in `kept`.

        Its own recurrent layers are all others. Raises `ConfigError` for a teacher that it can't be, or none at all.
        """
        raise ConfigError("no Transformer can be converted to it")

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        """Where each tensor of the file belongs in `model`, which is of `architecture`, or a student of it."""
        raise NotImplementedError


def require(config: Any, where: object, **allowed: Any) -> None:
    """Raises `ConfigError` where the config has another value for a key than the one that is known here."""
    for key, value in allowed.items():
        if (came := getattr(config, key, value)) != value:
            raise ConfigError(f"source={where}: {key}={came} is not supported; it must be {value}")


def activation(config: Any, where: object, key: str = "hidden_act") -> Any:
    """Our name of the config's activation. Raises `ConfigError`."""
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    names |= {"relu": "relu", "relu2": "relu2"}
    came = getattr(config, key)
    if came not in names:
        raise ConfigError(f"source={where}: {key}={came} is not supported; {', '.join(names)} are")
    return names[came]


def rotation(config: Any, where: object, head: int, kind: str = "") -> dict[str, Any]:
    """A softmax mixer's fields for the config's rotation of heads of `head` channels.

    `kind`: where rotations differ between layers (`rope_parameters` by layer type), the layers'. `longrope` and
    `dynamic` are those of the rows that `for_rows` says. Raises `ConfigError`.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    rope = rope[kind] if kind and kind in rope else rope
    base, name = float(rope["rope_theta"]), rope.get("rope_type", "default")
    width = int(head * rope.get("partial_rotary_factor", 1.0))
    fields: dict[str, Any] = {"rope_base": base, "rope_width": None if width == head else width}
    if name == "default":
        return fields
    known = ("default", "linear", "llama3", "yarn", *BY_LENGTH)
    if name not in known:
        raise ConfigError(f"source={where}: rope_type={name} is not supported; {', '.join(known)} are")
    options: dict[str, Any] = {"layer_type": kind} if kind else {}
    if name in BY_LENGTH:
        options["seq_len"] = getattr(config, "row_tokens", config.max_position_embeddings)
    try:
        rates, amplitude = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), **options)
    # Factors that are too few, or of other kinds.
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"source={where}: rope_type={name}: {' '.join(str(error).split())}") from None
    plain = base ** (-torch.arange(len(rates), dtype=torch.float64) / len(rates))
    return fields | {"rope_stretch": tuple((plain / rates.double()).tolist()), "rope_amplitude": float(amplitude)}


# Kinds of rotation that depend on how long a text is. transformers turns what it has read otherwise when the text gets
# longer; here a model has one rotation, that of its rows, so that no token depends on those that follow.
BY_LENGTH = ("longrope", "dynamic")


def for_rows(config: Any, tokens: int | None) -> Any:
    """The config with which `architecture` is that for rows of `tokens`; None: of as many as it was made for."""
    if tokens is None:
        return config
    config = copy.deepcopy(config)
    config.row_tokens = tokens
    return config


def heads_of(config: Any, where: object) -> tuple[int, int, int]:
    """Query heads, query heads that share a key head, and channels of a head. Raises `ConfigError`."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise ConfigError(f"source={where}: num_key_value_heads={groups} must divide num_attention_heads={heads}")
    # Some families' configs have no such key; in others it may be null.
    return heads, heads // groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def model_config(config: Any, where: object, layers: Sequence[str], **others: Any) -> ModelConfig:
    """What nearly all families' configs say by the same keys, and `others`."""
    fields: dict[str, Any] = {
        "layers": tuple(layers),
        "depth": len(layers),
        "width": config.hidden_size,
        "heads": getattr(config, "num_attention_heads", 1),
        "mlp_width": getattr(config, "intermediate_size", 0) or 0,
        "tie_embeddings": config.tie_word_embeddings,
        "norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "initializer_range": getattr(config, "initializer_range", 0.02),
    }
    return ModelConfig(**{**fields, **others})


def network(
    config: Any, where: object, layers: Sequence[str], mixers: Mapping[str, Any], **others: Any
) -> Architecture:
    """The network of these layers, with `others` of `ModelConfig`'s fields; of `mixers` those a layer has."""
    model = model_config(config, where, layers, **others)
    return Architecture(model, {name: mixers[name] for name in model.mixers if name in mixers}, config.vocab_size)


def sigmoid_router(config: Any) -> RouterConfig:
    """The router of DeepSeek-V3 and those after it, by the keys that all of them have."""
    return RouterConfig(
        score="sigmoid",
        normalize=config.norm_topk_prob,
        scale=float(config.routed_scaling_factor),
        bias=True,
        groups=config.n_group,
        chosen_groups=config.topk_group,
    )


def common_keys(model: LanguageModel) -> dict[str, Any]:
    """The reverse: what nearly all families' configs say of `model` by the same keys."""
    config = model.config
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
    }


def attention_keys(model: LanguageModel) -> dict[str, Any]:
    """What configs say of the softmax layers of `model`. Raises `ConfigError` where it has none."""
    found = [block.mixer for block in model.blocks if isinstance(block.mixer, SoftmaxAttention)]
    if not found:
        raise ConfigError("it has no softmax layers")
    mixer, own = found[0], found[0].config
    width = mixer.key if own.rope_width is None else own.rope_width
    rope = {"rope_type": "default", "rope_theta": own.rope_base, "partial_rotary_factor": width / mixer.key}
    return {
        "num_key_value_heads": mixer.groups,
        "head_dim": mixer.key,
        "attention_bias": own.qkv_bias and own.out_bias,
        "rope_parameters": rope if width < mixer.key else {key: rope[key] for key in ("rope_type", "rope_theta")},
    }


def delta_fields(config: Any) -> dict[str, Any]:
    """A Gated DeltaNet mixer's fields for what configs say of such layers by the same keys."""
    return {
        "heads": config.linear_num_value_heads,
        "key_heads": config.linear_num_key_heads,
        "key_width": config.linear_key_head_dim,
        "value_width": config.linear_value_head_dim,
        "conv_width": config.linear_conv_kernel_dim,
    }


def delta_keys(model: LanguageModel) -> dict[str, Any]:
    """What configs say of the Gated DeltaNet layers of `model`, and which they are. Raises `ConfigError`."""
    found = [block.mixer for block in model.blocks if isinstance(block.mixer, GatedDeltaNet)]
    if not found:
        raise ConfigError("it has no gated_delta_net layers")
    mixer = found[0]
    return {
        "linear_num_key_heads": mixer.key_heads,
        "linear_num_value_heads": mixer.shape.heads,
        "linear_key_head_dim": mixer.key,
        "linear_value_head_dim": mixer.value,
        "linear_conv_kernel_dim": mixer.config.conv_width,
        "linear_allow_neg_eigval": mixer.config.allow_negative_eigenvalues,
        "layer_types": [
            "linear_attention" if isinstance(block.mixer, GatedDeltaNet) else "full_attention" for block in model.blocks
        ],
    }


def plain(theirs: str, ours: str, module: nn.Module | None, *, lifted: bool = False) -> Iterator[Piece]:
    """The weight, and the bias where there is one, of a module that both sides have alike."""
    for kind in ("weight", "bias"):
        if isinstance(getattr(module, kind, None), Tensor):
            yield Piece(f"{theirs}.{kind}", f"{ours}.{kind}", lifted=lifted and kind == "weight")


def split(
    names: Sequence[str], ours: str, module: nn.Module, sizes: Sequence[int], *, lifted: bool = False
) -> Iterator[Piece]:
    """Modules `names` of a file as consecutive rows, `sizes` of them, of one of ours."""
    for name, (first, end) in zip(names, pairwise(accumulate(sizes, initial=0)), strict=True):
        for kind in ("weight", "bias"):
            if isinstance(getattr(module, kind, None), Tensor):
                yield Piece(f"{name}.{kind}", f"{ours}.{kind}", slice(first, end), lifted=lifted and kind == "weight")


def interleaved(sizes: Mapping[str, int], groups: int) -> dict[str, Tensor]:
    """The rows of each named part of a matrix whose rows are, for each of `groups`, `sizes` of every part in turn."""
    whole = torch.arange(groups * sum(sizes.values())).view(groups, -1)
    parts = whole.split(list(sizes.values()), 1)
    return {name: rows.flatten() for name, rows in zip(sizes, parts, strict=True)}


def attention_pieces(
    theirs: str,
    ours: str,
    mixer: SoftmaxAttention,
    *,
    norms: tuple[str, str] = ("q_norm", "k_norm"),
    out: str = "o_proj",
) -> Iterator[Piece]:
    """A softmax layer with separate projections of queries, keys and values; `norms`, `out`: what files call these."""
    names = [f"{theirs}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    yield from split(names, f"{ours}.qkv", mixer.qkv, mixer.channels)
    for name, own in zip((*norms, out), ("q_norm", "k_norm", "out"), strict=True):
        yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))


def mlp_pieces(
    theirs: str, ours: str, mlp: MLP, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Iterator[Piece]:
    """An MLP with separate projections of gate and value."""
    names = (gate, up) if mlp.gated else (up,)
    sizes = len(names) * [mlp.up.weight.shape[0] // len(names)]
    yield from split([f"{theirs}.{name}" for name in names], f"{ours}.up", mlp.up, sizes)
    yield from plain(f"{theirs}.{down}", f"{ours}.out", mlp.out)


@dataclass(frozen=True)
class MoENames:
    """What a family calls the parts of its mixture of experts; `experts` has a place `{e}` for the number."""

    router: str = "gate"
    experts: str = "experts.{e}"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"
    bias: str = "gate.e_score_correction_bias"


def moe_pieces(theirs: str, ours: str, moe: MoE, names: MoENames = MoENames()) -> Iterator[Piece]:
    """Experts whose matrices the file has one by one."""
    yield from plain(f"{theirs}.{names.router}", f"{ours}.router", moe.router)
    if moe.bias is not None:
        yield Piece(f"{theirs}.{names.bias}", f"{ours}.bias")
    hidden = moe.down.shape[2]
    for index in range(len(moe.up)):
        expert = f"{theirs}.{names.experts}".replace("{e}", str(index))
        first = slice(0, hidden) if moe.gated else None
        if moe.gated:
            yield Piece(f"{expert}.{names.gate}.weight", f"{ours}.up", first, expert=index)
        second = slice(hidden, None) if moe.gated else None
        yield Piece(f"{expert}.{names.up}.weight", f"{ours}.up", second, expert=index)
        yield Piece(f"{expert}.{names.down}.weight", f"{ours}.down", expert=index)
    if moe.shared is not None:
        yield from mlp_pieces(f"{theirs}.{names.shared}", f"{ours}.shared", moe.shared)
    yield from plain(f"{theirs}.{names.shared_gate}", f"{ours}.shared_gate", moe.shared_gate)


def feed_forward_pieces(theirs: str, ours: str, part: nn.Module, names: MoENames = MoENames()) -> Iterator[Piece]:
    """An MLP or experts, whichever the layer has."""
    if isinstance(part, MoE):
        yield from moe_pieces(theirs, ours, part, names)
    elif isinstance(part, MLP):
        yield from mlp_pieces(theirs, ours, part)


def outer_pieces(model: LanguageModel, prefix: str = "model.", *, norm: str = "norm") -> Iterator[Piece]:
    """Embedding, last norm and head."""
    yield Piece(f"{prefix}embed_tokens.weight", "embedding.weight")
    yield Piece(f"{prefix}{norm}.weight", "norm.weight")
    yield Piece("lm_head.weight", "head.weight")


def recurrent_but_in(
    teacher: Architecture, kept: Collection[int], mixer: str, recurrent: Any, softmax: Any, **others: Any
) -> Architecture:
    """`teacher` with layers of `mixer`, whose config is `recurrent`, but in `kept`; `softmax`: the config of those.

    `others`: fields of `ModelConfig` that differ.
    """
    model = teacher.model
    layers = tuple("attention" if index in kept else mixer for index in range(model.depth))
    mixers = {name: each for name, each in (("attention", softmax), (mixer, recurrent)) if name in layers}
    return Architecture(replace(model, layers=layers, **others), mixers, teacher.vocab_size)


def attention_of(teacher: Architecture) -> Any:
    """The config of its attention, for families whose own sees all tokens, and whose MLPs have no biases.

    Raises `ConfigError` for others.
    """
    if set(teacher.model.layers) != {"attention"}:
        raise ConfigError("its softmax layers see all tokens, and the teacher's have windows")
    if teacher.model.mlp_bias:
        raise ConfigError("its MLPs have no biases, and the teacher's have")
    return teacher.mixers["attention"]


def head_width(teacher: Architecture) -> int:
    """Channels of a head of its attention."""
    own: int = teacher.mixers["attention"].head_width
    return own or teacher.model.width // teacher.model.heads
