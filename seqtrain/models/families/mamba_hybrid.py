"""Hybrids of Mamba and softmax attention: Bamba, Granite 4, Falcon-H1, Nemotron-H, Jamba, Zamba2."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.mixers.common.attention import SoftmaxAttention
from seqtrain.mixers.mamba2 import Mamba2
from seqtrain.mixers.parallel import Branch
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    MoENames,
    Piece,
    activation,
    attention_keys,
    attention_of,
    attention_pieces,
    common_keys,
    feed_forward_pieces,
    head_width,
    heads_of,
    mlp_pieces,
    network,
    outer_pieces,
    plain,
    recurrent_but_in,
    require,
    rotation,
    sigmoid_router,
)
from seqtrain.models.families.dense import FULL
from seqtrain.models.families.mamba import UNADAPTED, mamba2_pieces, mamba_pieces, stack_pieces, step_limits
from seqtrain.models.feed_forward import MoE, RouterConfig
from seqtrain.models.language_model import LanguageModel
from seqtrain.models.shared import SharedConfig

MAMBA2 = "mamba2"


@dataclass(frozen=True)
class Bamba(Family):
    """Mamba-2 or softmax attention in each layer, and a SwiGLU. `mlp_norm`, `last_norm`: names of norms."""

    mlp_norm: str = "pre_ff_layernorm"
    last_norm: str = "final_layernorm"

    def architecture(self, config: Any, where: object) -> Architecture:
        layers = [MAMBA2 if kind == "linear_attention" else FULL for kind in config.layer_types]
        kinds = {MAMBA2: self.mamba, FULL: self.attention}
        mixers = {name: kinds[name](config, where) for name in dict.fromkeys(layers)}
        others = {"activation": activation(config, where), **self.others(config)}
        return network(config, where, layers, mixers, **others)

    def others(self, config: Any) -> Mapping[str, Any]:
        """What the network has besides mixers."""
        return {"mlp_bias": config.mlp_bias}

    def mamba(self, config: Any, where: object, **others: Any) -> Any:
        """The config of Mamba-2 layers, and `others` of its fields."""
        require(config, where, hidden_act="silu")
        fields = {
            "heads": config.mamba_n_heads,
            "head_width": config.mamba_d_head,
            "state": config.mamba_d_state,
            "groups": config.mamba_n_groups,
            "conv_width": config.mamba_d_conv,
            "norm_eps": config.rms_norm_eps,
            "in_bias": config.mamba_proj_bias,
            "conv_bias": config.mamba_conv_bias,
            "out_bias": config.mamba_proj_bias,
            **step_limits(config.time_step_limit),
        }
        return MIXERS.get(MAMBA2).Config(**{**fields, **others})

    def attention(self, config: Any, where: object, **others: Any) -> Any:
        """The config of softmax layers, and `others` of its fields."""
        _, shared, head = heads_of(config, where)
        biased = bool(getattr(config, "attention_bias", False))
        fields = {"query_group": shared, "head_width": head, "qkv_bias": biased, "out_bias": biased}
        turned = {} if "rope_width" in others else rotation(config, where, head)
        return MIXERS.get(FULL).Config(**fields, **turned, **others)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model, norm=self.last_norm)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            yield from self.mixer_pieces(theirs, f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.{self.mlp_norm}", f"{ours}.mlp_norm", block.mlp_norm)
            yield from self.feed_forward_pieces(theirs, f"{ours}.mlp", block.mlp)

    def mixer_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        """A layer's mixer."""
        if hasattr(mixer, "qkv"):
            yield from attention_pieces(f"{theirs}.self_attn", ours, mixer)
        else:
            yield from mamba2_pieces(f"{theirs}.mamba", ours, mixer)

    def feed_forward_pieces(self, theirs: str, ours: str, part: Any) -> Iterator[Piece]:
        """What follows it."""
        yield from feed_forward_pieces(f"{theirs}.feed_forward", ours, part)


@dataclass(frozen=True)
class Granite(Bamba):
    """With multipliers, and with routed experts beside a shared one or the latter alone."""

    mlp_norm: str = "post_attention_layernorm"
    last_norm: str = "norm"

    def others(self, config: Any) -> Mapping[str, Any]:
        scales = {
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": 1 / config.logits_scaling,
        }
        if not config.num_local_experts:
            return scales | {"mlp_width": config.shared_intermediate_size}
        return scales | {
            "experts": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
            "expert_width": config.intermediate_size,
            "shared_expert_width": config.shared_intermediate_size,
        }

    def attention(self, config: Any, where: object, **others: Any) -> Any:
        fixed = {} if config.position_embedding_type == "rope" else {"rope_width": 0}
        return super().attention(config, where, scale=float(config.attention_multiplier), **fixed, **others)

    def hybrid_of(self, teacher: Architecture, kept: Collection[int]) -> Architecture:
        """Mamba-2 of twice the model's width, as llama.cpp needs it, with the heads of attention as its groups."""
        model, softmax, key = teacher.model, attention_of(teacher), head_width(teacher)
        if 2 * model.width % (model.heads * key):
            raise ConfigError(f"twice model.width={model.width} must be a multiple of {model.heads} heads x {key}")
        mamba = MIXERS.get(MAMBA2).Config(
            heads=2 * model.width // key, head_width=key, state=key, groups=model.heads, norm_eps=model.norm_eps
        )
        bias = softmax.qkv_bias or softmax.out_bias
        # Of norms that it has not, nothing is to be said.
        plain = {"qk_norm": False, "norm_eps": type(softmax)().norm_eps}
        attention = replace(softmax, scale=key**-0.5, qkv_bias=bias, out_bias=bias, **plain)
        return recurrent_but_in(teacher, kept, MAMBA2, mamba, attention)

    def config_of(self, model: LanguageModel) -> dict[str, Any]:
        config, mixers = model.config, [block.mixer for block in model.blocks]
        mamba = next((mixer for mixer in mixers if isinstance(mixer, Mamba2)), None)
        softmax = next((mixer for mixer in mixers if isinstance(mixer, SoftmaxAttention)), None)
        keys = common_keys(model)
        if softmax is not None:
            keys |= attention_keys(model)
            keys["attention_multiplier"] = softmax.config.scale or softmax.key**-0.5
            rotated = softmax.config.rope_width != 0
        else:
            keys |= {"num_key_value_heads": config.heads}
            rotated = True
        if mamba is None:
            keys |= {"mamba_n_heads": 1}
        else:
            own = mamba.config
            keys |= {
                "mamba_n_heads": mamba.shape.heads,
                "mamba_d_head": mamba.value,
                "mamba_d_state": own.state,
                "mamba_n_groups": own.groups,
                "mamba_d_conv": own.conv_width,
                "mamba_expand": mamba.inner // config.width,
                "mamba_conv_bias": own.conv_bias,
                "mamba_proj_bias": own.in_bias,
            }
        return keys | {
            "layer_types": ["linear_attention" if isinstance(x, Mamba2) else "full_attention" for x in mixers],
            "position_embedding_type": "rope" if rotated else None,
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1 / config.logit_scale,
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "intermediate_size": config.expert_width or config.hidden,
            "shared_intermediate_size": config.shared_expert_width if config.experts else config.hidden,
        }

    def feed_forward_pieces(self, theirs: str, ours: str, part: Any) -> Iterator[Piece]:
        shared, place = part, ours
        if isinstance(part, MoE):
            names = (("router.layer.weight", "router.weight"), ("input_linear.weight", "up"))
            for name, own in (*names, ("output_linear.weight", "down")):
                yield Piece(f"{theirs}.block_sparse_moe.{name}", f"{ours}.{own}")
            shared, place = part.shared, f"{ours}.shared"
        if shared is not None:
            yield from plain(f"{theirs}.shared_mlp.input_linear", f"{place}.up", shared.up)
            yield from plain(f"{theirs}.shared_mlp.output_linear", f"{place}.out", shared.out)


@dataclass(frozen=True)
class FalconH1(Bamba):
    """Both mixers side by side in every layer, with multipliers all over."""

    def architecture(self, config: Any, where: object) -> Architecture:
        _, _, head = heads_of(config, where)
        mamba = self.mamba(
            config,
            where,
            out_bias=config.projectors_bias,
            scales=tuple(map(float, config.ssm_multipliers)),
            gate=("after_norm" if config.mamba_norm_before_gate else "before_norm")
            if config.mamba_rms_norm
            else "no_norm",
        )
        attention = self.attention(config, where, scale=config.key_multiplier * head**-0.5)
        branches = (
            Branch(MAMBA2, mamba, config.ssm_in_multiplier, config.ssm_out_multiplier),
            Branch(FULL, attention, config.attention_in_multiplier, config.attention_out_multiplier),
        )
        layers = ["parallel"] * config.num_hidden_layers
        others = {
            "activation": activation(config, where),
            "mlp_bias": config.mlp_bias,
            "mlp_gate_scale": float(config.mlp_multipliers[0]),
            "mlp_out_scale": float(config.mlp_multipliers[1]),
            "embedding_scale": float(config.embedding_multiplier),
            "logit_scale": float(config.lm_head_multiplier),
        }
        mixers = {"parallel": MIXERS.get("parallel").Config(branches=branches)}
        return network(config, where, layers, mixers, **others)

    def mixer_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        for index, branch in enumerate(mixer.branches):
            yield from super().mixer_pieces(theirs, f"{ours}.branches.{index}", branch)


@dataclass(frozen=True)
class NemotronH(Bamba):
    """Mamba-2, softmax attention without positions, an MLP or experts: one of them in each layer."""

    def architecture(self, config: Any, where: object) -> Architecture:
        kinds = config.layers_block_type
        names = {"linear_attention": MAMBA2, "full_attention": FULL}
        layers = [names.get(kind, "none") for kind in kinds]
        mixers = {MAMBA2: self.mamba, FULL: self.attention}
        others = {
            "mlps": tuple("none" if kind in names else kind for kind in kinds),
            "activation": activation(config, where, "mlp_hidden_act"),
            "mlp_gated": False,
            "mlp_bias": config.mlp_bias,
            "norm_eps": config.layer_norm_epsilon,
            # transformers never ties its head.
            "tie_embeddings": False,
            **(self.experts(config, where) if "moe" in kinds else {}),
        }
        used = {name: mixers[name](config, where) for name in mixers if name in layers}
        return network(config, where, layers, used, **others)

    def experts(self, config: Any, where: object) -> dict[str, Any]:
        """What the network has of a mixture of experts."""
        require(config, where, mlp_bias=False)
        return {
            "experts": config.n_routed_experts,
            "experts_per_token": config.num_experts_per_tok,
            "expert_width": config.moe_intermediate_size,
            "shared_expert_width": config.moe_shared_expert_intermediate_size,
            "expert_latent": config.moe_latent_size or 0,
            "router": sigmoid_router(config),
        }

    def mamba(self, config: Any, where: object, **others: Any) -> Any:
        require(config, where, mamba_hidden_act="silu")
        return MIXERS.get(MAMBA2).Config(
            heads=config.mamba_num_heads,
            head_width=config.mamba_head_dim,
            state=config.ssm_state_size,
            groups=config.n_groups,
            conv_width=config.conv_kernel,
            norm_eps=config.layer_norm_epsilon,
            in_bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            out_bias=config.use_bias,
            # transformers takes this for the lowest step size, and has no highest.
            step_min=config.time_step_min,
            **others,
        )

    def attention(self, config: Any, where: object, **others: Any) -> Any:
        _, shared, head = heads_of(config, where)
        return MIXERS.get(FULL).Config(query_group=shared, head_width=head, rope_width=0, **others)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from stack_pieces(model, "model.")
        names = MoENames(shared="shared_experts")
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            kind = "mixer" if block.mixer is not None else "mlp"
            yield from plain(f"{theirs}.norm", f"{ours}.{kind}_norm", block.get_submodule(f"{kind}_norm"))
            theirs, ours, part = f"{theirs}.mixer", f"{ours}.{kind}", block.get_submodule(kind)
            if isinstance(part, MoE):
                yield from feed_forward_pieces(theirs, ours, part, names)
                yield from plain(f"{theirs}.fc1_latent_proj", f"{ours}.enter", part.enter)
                yield from plain(f"{theirs}.fc2_latent_proj", f"{ours}.out", part.out)
            elif kind == "mlp":
                yield from mlp_pieces(theirs, ours, part)
            elif hasattr(part, "qkv"):
                yield from attention_pieces(theirs, ours, part)
            else:
                yield from mamba2_pieces(theirs, ours, part)


@dataclass(frozen=True)
class Jamba(Bamba):
    """Mamba or softmax attention without positions, and an MLP or experts."""

    def architecture(self, config: Any, where: object) -> Architecture:
        names = {"linear_attention": "mamba", "full_attention": FULL}
        layers = [names[kind] for kind in config.layer_types]
        mamba = MIXERS.get("mamba").Config(
            expand=config.mamba_expand,
            state=config.mamba_d_state,
            conv_width=config.mamba_d_conv,
            rank=config.mamba_dt_rank,
            norms="learned",
            norm_eps=config.rms_norm_eps,
            bias=config.mamba_proj_bias,
            conv_bias=config.mamba_conv_bias,
        )
        require(config, where, hidden_act="silu")
        _, shared, head = heads_of(config, where)
        attention = MIXERS.get(FULL).Config(query_group=shared, head_width=head, rope_width=0)
        return network(config, where, layers, {"mamba": mamba, FULL: attention}, **self.others(config))

    def others(self, config: Any) -> Mapping[str, Any]:
        kinds = tuple("moe" if experts > 1 else "mlp" for experts in config.layers_num_experts)
        if "moe" not in kinds:
            return {}
        return {
            "mlps": kinds,
            "experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok,
            "router": RouterConfig(normalize=False),
        }

    def mixer_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        if hasattr(mixer, "qkv"):
            yield from attention_pieces(f"{theirs}.self_attn", ours, mixer)
        else:
            yield from mamba_pieces(f"{theirs}.mamba", ours, mixer)

    def feed_forward_pieces(self, theirs: str, ours: str, part: Any) -> Iterator[Piece]:
        yield from feed_forward_pieces(f"{theirs}.feed_forward", ours, part, MoENames(router="router"))


@dataclass(frozen=True)
class Zamba2(Bamba):
    """Mamba-2 layers; before some of them a block of attention and an MLP that several share, with adapters."""

    def architecture(self, config: Any, where: object) -> Architecture:
        uses, counts = self.uses(config), config.num_mem_blocks
        blocks = [1 + uses.index(index) % counts if index in uses else 0 for index in range(config.num_hidden_layers)]
        rank = config.adapter_rank if config.use_shared_attention_adapter else 0
        _, _, head = heads_of(config, where)
        fixed = {} if config.use_mem_rope else {"rope_width": 0}
        attention = self.attention(config, where, scale=(head / 2) ** -0.5, adapter_rank=rank, **fixed)
        others = {
            "mlps": ("none",),
            "mlp_bias": config.add_bias_linear,
            "activation": activation(config, where),
            "shared": SharedConfig(layers=tuple(blocks), mixer=FULL, adapter_rank=config.adapter_rank),
        }
        mixers = {MAMBA2: self.mamba(config, where), FULL: attention}
        return network(config, where, [MAMBA2] * config.num_hidden_layers, mixers, **others)

    def uses(self, config: Any) -> list[int]:
        """The layers that have a shared block."""
        return [index for index, kind in enumerate(config.layers_block_type) if kind == "hybrid"]

    def mamba(self, config: Any, where: object, **others: Any) -> Any:
        return MIXERS.get(MAMBA2).Config(
            heads=config.n_mamba_heads,
            head_width=config.mamba_headdim,
            state=config.mamba_d_state,
            groups=config.mamba_ngroups,
            conv_width=config.mamba_d_conv,
            # transformers has this and the convolution's bias in any case.
            norm_eps=1e-5,
            in_bias=config.add_bias_linear,
            out_bias=config.add_bias_linear,
            step_min=config.time_step_min,
            **others,
        )

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model, norm="final_layernorm")
        uses = self.uses(config)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            if index in uses:
                yield from self.shared_pieces(config, index, model)
                yield from plain(f"{theirs}.linear", f"{ours}.shared.out", block.shared.out)
                theirs = f"{theirs}.mamba_decoder"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            yield from mamba2_pieces(f"{theirs}.mamba", f"{ours}.mixer", block.mixer)

    def shared_pieces(self, config: Any, index: int, model: LanguageModel) -> Iterator[Piece]:
        """A shared block as it stands in layer `index`, with the adapters of all layers that use it."""
        uses, theirs = self.uses(config), f"model.layers.{index}.shared_transformer"
        number, count = uses.index(index) % config.num_mem_blocks, config.num_mem_blocks
        ours, shared = f"blocks.{uses[number]}.shared", model.blocks[index].shared
        yield from plain(f"{theirs}.input_layernorm", f"{ours}.attention_norm", shared.attention_norm)
        yield from attention_pieces(f"{theirs}.self_attn", f"{ours}.attention", shared.attention)
        yield from plain(f"{theirs}.pre_ff_layernorm", f"{ours}.mlp_norm", shared.mlp_norm)
        yield from plain(f"{theirs}.feed_forward.gate_up_proj", f"{ours}.mlp.up", shared.mlp.up)
        yield from plain(f"{theirs}.feed_forward.down_proj", f"{ours}.mlp.out", shared.mlp.out)
        for use in range(number, len(uses), count):
            place, shared = f"blocks.{uses[use]}.shared", model.blocks[uses[use]].shared
            names = [f"self_attn.linear_{name}_adapter_list" for name in "qkv"]
            for part, files in (("attention", names), ("mlp", ["feed_forward.gate_up_proj_adapter_list"])):
                for which, adapter in enumerate(shared.get_submodule(part).adapter or ()):
                    for step, layer in enumerate(adapter):
                        name = f"{theirs}.{files[which]}.{use}.{step}"
                        yield from plain(name, f"{place}.{part}.adapter.{which}.{step}", layer)

    def fitted(self, places: dict[str, list[Piece]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """Files have what layers share in the first of them, or in each."""
        known = {repr([replace(piece, theirs="") for piece in places[name]]) for name in shapes if name in places}
        return {
            name: pieces
            for name, pieces in places.items()
            if name in shapes or repr([replace(piece, theirs="") for piece in pieces]) not in known
        }


FAMILIES = {
    "zamba2": Zamba2(),
    "bamba": Bamba(),
    "granitemoehybrid": Granite(target=True),
    "falcon_h1": FalconH1(unadapted=UNADAPTED),
    "nemotron_h": NemotronH(("mtp.",), renamed=(("backbone.", "model."),), unadapted=UNADAPTED),
    "jamba": Jamba(unadapted=(".dt_proj",)),
}
