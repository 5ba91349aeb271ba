"""Kimi Linear and Ling 3 (bailing_hybrid): Kimi Delta Attention and latent attention, MLPs and experts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import (
    Family,
    MoENames,
    Piece,
    feed_forward_pieces,
    network,
    outer_pieces,
    plain,
    require,
    rotation,
    sigmoid_router,
    split,
)
from seqtrain.models.language_model import LanguageModel

KDA, LATENT = "kda", "latent_attention"
NUMBERED = MoENames(gate="w1", up="w3", down="w2", shared="shared_experts")
NAMED = MoENames(shared="shared_experts")
LOW_RANK = (("f_a_proj", "decay.0"), ("f_b_proj", "decay.1"), ("g_a_proj", "gate.0"), ("g_b_proj", "gate.1"))


@dataclass(frozen=True)
class Kimi(Family):
    """`names`: of the parts of its experts. `gates`: of what makes decay and output gate, and of ours.

    `rates`: the shape of the decays' rates in files; empty: a list.
    """

    names: MoENames = NUMBERED
    gates: tuple[tuple[str, str], ...] = LOW_RANK
    rates: tuple[int, ...] = (1, 1, -1, 1)

    def architecture(self, config: Any, where: object) -> Architecture:
        require(config, where, hidden_act="silu", num_key_value_heads=config.num_attention_heads)
        layers = [KDA if kind == "linear_attention" else LATENT for kind in config.layer_types]
        mixers = {
            KDA: MIXERS.get(KDA).Config(
                heads=config.linear_num_heads,
                key_width=config.linear_head_dim,
                value_width=config.linear_head_dim,
                conv_width=config.linear_conv_kernel_dim,
                norm_eps=config.rms_norm_eps,
                **self.delta_options(config),
            ),
            LATENT: MIXERS.get(LATENT).Config(
                rank=config.kv_lora_rank,
                key_width=config.qk_nope_head_dim,
                shared_width=config.qk_rope_head_dim,
                value_width=config.v_head_dim,
                bias=config.attention_bias,
                **self.latent_options(config, where),
            ),
        }
        # transformers never ties its head.
        return network(config, where, layers, mixers, tie_embeddings=False, **experts(config))

    def delta_options(self, config: Any) -> dict[str, Any]:
        """What this family's delta attention has of its own."""
        return {}

    def latent_options(self, config: Any, where: object) -> dict[str, Any]:
        """What its latent attention has of its own."""
        return {"query_rank": config.q_lora_rank or 0, "rotary": False}

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield from outer_pieces(model)
        for index, block in enumerate(model.blocks):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", block.mixer_norm)
            pieces = self.delta_pieces if config.layer_types[index] == "linear_attention" else self.latent_pieces
            yield from pieces(f"{theirs}.self_attn", f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", block.mlp_norm)
            yield from feed_forward_pieces(f"{theirs}.mlp", f"{ours}.mlp", block.mlp, self.names)

    def delta_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        """A delta attention layer."""
        for kind, lifted in (("proj", False), ("conv1d", True)):
            own = "conv" if lifted else "linear"
            names = [f"{theirs}.{part}_{kind}" for part in "qkv"]
            module = mixer.qkv.get_submodule(own)
            yield from split(names, f"{ours}.qkv.{own}", module, mixer.qkv.channels, lifted=lifted)
        yield from plain(f"{theirs}.b_proj", f"{ours}.beta", mixer.beta)
        yield from plain(f"{theirs}.o_norm", f"{ours}.norm.norm", mixer.norm.norm)
        yield from plain(f"{theirs}.o_proj", f"{ours}.out", mixer.out)
        yield Piece(f"{theirs}.dt_bias", f"{ours}.step_bias")
        for name, own in self.gates:
            yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))
        yield Piece(f"{theirs}.A_log", f"{ours}.rate_log", shape=self.rates)

    def latent_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        """A latent attention layer."""
        names = ("q_a_proj", "q_a_layernorm", "q_b_proj") if len(mixer.query) > 1 else ("q_proj",)
        for index, name in enumerate(names):
            yield from plain(f"{theirs}.{name}", f"{ours}.query.{index}", mixer.query[index])
        yield from plain(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.latent", mixer.latent)
        yield from latent_ends(theirs, ours, mixer)


@dataclass(frozen=True)
class Bailing(Kimi):
    """With bounded decays, gates of full rank, and a latent attention that rotates neighboring channels together."""

    names: MoENames = NAMED
    gates: tuple[tuple[str, str], ...] = (("f_proj", "decay"), ("g_proj", "gate"))
    rates: tuple[int, ...] = ()

    def delta_options(self, config: Any) -> dict[str, Any]:
        return {"low_rank": False, "log_decay_bound": config.kda_lower_bound if config.kda_safe_gate else 0.0}

    def latent_options(self, config: Any, where: object) -> dict[str, Any]:
        turned = rotation(config, where, config.qk_rope_head_dim)
        # transformers turns all shared channels, whatever the config says.
        del turned["rope_width"]
        rope, scale = config.rope_parameters, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
            scale *= (0.1 * rope["mscale_all_dim"] * math.log(max(rope["factor"], 1)) + 1) ** 2
        return {**turned, "scale": scale, "output_gate": True}

    def latent_pieces(self, theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
        # What is rotated together lies half of the shared channels apart here.
        shared = torch.arange(mixer.shared).view(-1, 2).T.flatten()
        own, heads = torch.arange(mixer.key), torch.arange(mixer.shape.heads)[:, None] * (mixer.key + mixer.shared)
        rows = (heads + torch.cat([own, mixer.key + shared])).flatten()
        yield Piece(f"{theirs}.q_proj.weight", f"{ours}.query.0.weight", their_rows=rows)
        rows = torch.cat([torch.arange(mixer.rank), mixer.rank + shared])
        for kind in ("weight", "bias") if mixer.config.bias else ("weight",):
            yield Piece(f"{theirs}.kv_a_proj_with_mqa.{kind}", f"{ours}.latent.{kind}", their_rows=rows)
        yield from latent_ends(theirs, ours, mixer)
        yield from plain(f"{theirs}.g_proj", f"{ours}.gate", mixer.gate)


def latent_ends(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """What a latent attention layer has behind its latent."""
    for name, own in (("kv_a_layernorm", "norm"), ("kv_b_proj", "expand"), ("o_proj", "out")):
        yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))


def experts(config: Any) -> dict[str, Any]:
    """What the network has of a mixture of experts."""
    if "sparse" not in config.mlp_layer_types:
        return {}
    return {
        "mlps": tuple("moe" if kind == "sparse" else "mlp" for kind in config.mlp_layer_types),
        "experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_width": config.moe_intermediate_size,
        "shared_expert_width": config.moe_intermediate_size * config.n_shared_experts,
        "router": sigmoid_router(config),
    }


# Published files name what transformers' class names otherwise; transformers saves a dense layer's MLP as experts.
RENAMED = (("word_embeddings", "embed_tokens"), (".attention.", ".self_attn."), (".dense.", ".o_proj."))
FAMILIES = {
    "kimi_linear": Kimi(renamed=((".block_sparse_moe.", ".mlp."),)),
    # The layer after the last of the published model: multi-token prediction.
    "bailing_hybrid": Bailing(
        ("model.layers.42.",), renamed=(*RENAMED, ("gate.expert_bias", "gate.e_score_correction_bias"))
    ),
}
