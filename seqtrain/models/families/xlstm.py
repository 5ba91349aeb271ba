"""xLSTM 7B: mLSTM layers and a SwiGLU, with capped gates and logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from seqtrain.mixers import MIXERS
from seqtrain.models.architecture import Architecture
from seqtrain.models.families.base import Family, Piece, mlp_pieces, network, plain, require, split
from seqtrain.models.language_model import LanguageModel

MLSTM = "mlstm"


@dataclass(frozen=True)
class XLSTM(Family):
    """Such layers alone."""

    def architecture(self, config: Any, where: object) -> Architecture:
        # Norms would have biases, too; and transformers itself can't make a fused model.
        require(config, where, use_bias=False, weight_mode="single")
        width, multiple = config.hidden_size, config.ffn_round_up_to_multiple_of
        mixer = MIXERS.get(MLSTM).Config(
            expand_key=int(width * config.qk_dim_factor) / width,
            expand_value=int(width * config.v_dim_factor) / width,
            conv_width=0,
            gate_cap=config.gate_soft_cap,
            norm_eps=config.norm_eps,
        )
        others = {
            "heads": config.num_heads,
            "mlp_width": int((width * config.ffn_proj_factor + multiple - 1) // multiple) * multiple,
            "norm_eps": config.norm_eps,
            "logit_cap": config.output_logit_soft_cap,
            # transformers never ties its head.
            "tie_embeddings": False,
        }
        return network(config, where, [MLSTM] * config.num_hidden_layers, {MLSTM: mixer}, **others)

    def pieces(self, config: Any, model: LanguageModel) -> Iterator[Piece]:
        yield Piece("backbone.embeddings.weight", "embedding.weight")
        yield Piece("backbone.out_norm.weight", "norm.weight")
        yield Piece("lm_head.weight", "head.weight")
        for index, block in enumerate(model.blocks):
            theirs, ours = f"backbone.blocks.{index}", f"blocks.{index}"
            yield from plain(f"{theirs}.norm_mlstm", f"{ours}.mixer_norm", block.mixer_norm)
            yield from mlstm_pieces(f"{theirs}.mlstm_layer", f"{ours}.mixer", block.mixer)
            yield from plain(f"{theirs}.norm_ffn", f"{ours}.mlp_norm", block.mlp_norm)
            names = {"gate": "proj_up_gate", "up": "proj_up", "down": "proj_down"}
            yield from mlp_pieces(f"{theirs}.ffn", f"{ours}.mlp", block.mlp, **names)


def mlstm_pieces(theirs: str, ours: str, mixer: Any) -> Iterator[Piece]:
    """An mLSTM layer."""
    gates = [f"{theirs}.{name}gate_preact" for name in "if"]
    yield from split([f"{theirs}.{name}" for name in "qkv"], f"{ours}.qkv.linear", mixer.qkv.linear, mixer.qkv.channels)
    yield from split(gates, f"{ours}.gates", mixer.gates, 2 * [mixer.shape.heads])
    for name, own in (("ogate_preact", "gate"), ("multihead_norm", "norm"), ("out_proj", "out")):
        yield from plain(f"{theirs}.{name}", f"{ours}.{own}", mixer.get_submodule(own))


FAMILIES = {"xlstm": XLSTM()}
