"""Linear, windowed and full attention side by side in one layer: SpikingBrain's intra-layer hybrid (arXiv 2509.05276).

All branches read the same queries, keys and values, so that a softmax layer's weights serve each of them. Every
branch's heads are normalised before the sum, as in Hymba (arXiv 2411.13676): their sizes differ, and drift apart as a
sequence grows. The 76B is `feature_map=sigmoid tied_gate=true learned_sinks=128`; every seventh of its layers has
`window=0 full=true`. There the sinks are embeddings in front of the text, which see each other alone; so they come to
keys and values that no text changes, and these are what is learned here, in each windowed layer.
"""

from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from seqtrain.kernels import linear_attention, sink_attention, softmax_attention
from seqtrain.layers import FEATURE_MAPS, HeadNorm, LowRank, log_forget, positions
from seqtrain.mixers import LayerShape, Past, SequenceContext, State
from seqtrain.mixers.common.attention import LearnedSinks, SoftmaxAttention, attend
from seqtrain.mixers.common.recurrence import run_grouped


class IntraHybrid(SoftmaxAttention):
    """`y = W (norm(gated linear attention) [+ norm(attention in a window)] [+ norm(full attention)])` of one q, k, v.

    The linear branch forgets as GLA does, or with `tied_gate` what a key makes room for, and knows no positions; the
    softmax branches rotate q and k by them.
    """

    class Config(SoftmaxAttention.Config):
        # Tokens a query sees in the windowed branch, its own included; 0: no such branch.
        window: NonNegativeInt = 512
        # True: a branch sees all tokens before; its state, all keys and values, grows.
        full: bool = False
        # First tokens of a document that stay in sight of the windowed branch.
        sinks: NonNegativeInt = 0
        # Learned keys and values that every query of the windowed branch sees.
        learned_sinks: NonNegativeInt = 0
        # What queries and keys of the linear branch pass through.
        feature_map: Literal["identity", "relu", "sigmoid"] = "identity"
        # Rank of the matrix that makes the linear branch's forget gate.
        gate_rank: PositiveInt = 16
        # The forget gate is a sigmoid to the power 1 / temperature: larger forgets more slowly.
        gate_temperature: PositiveFloat = 16.0
        # True: the forget gate is 1 - key, without a matrix; needs feature_map=sigmoid.
        tied_gate: bool = False

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        # The state of a key head isn't divided.
        shape.share(self.all_groups, f"{self.all_groups} key heads with a state")
        if config.tied_gate and config.feature_map != "sigmoid":
            rule = f"needs keys between 0 and 1, which feature_map={config.feature_map} doesn't give; use sigmoid"
            raise self.config_error("tied_gate", "true", rule)
        held = config.sinks or config.learned_sinks
        if held and not config.window:
            raise self.config_error("window", 0, "sinks and learned_sinks are for a windowed branch, which isn't there")
        if held and config.score_cap:
            raise self.config_error("score_cap", config.score_cap, "isn't there beside sinks; use 0")
        self.feature_map, _ = FEATURE_MAPS[config.feature_map]
        gates = self.groups * self.key
        self.forget = None if config.tied_gate else LowRank(shape.width, config.gate_rank, gates, bias=True)
        self.sinks = LearnedSinks(config.learned_sinks, self.groups, self.key) if config.learned_sinks else None
        branches = 1 + (config.window > 0) + config.full
        self.norms = nn.ModuleList(HeadNorm(self.key) for _ in range(branches))

    def mix(self, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        q, k, v, *gate = self.project(x)
        out, memory = self.recur(x, q, k, v, past, sequence)
        branches, after = [out], {"memory": memory}
        place, after["position"] = positions(x, past.get("position"), sequence)
        q, k = self.rotated(q, place), self.rotated(k, place)
        scale, config = self.config.scale or self.key**-0.5, self.config
        options: dict[str, Any] = {"scale": scale, "score_cap": config.score_cap}
        if config.sinks or config.learned_sinks:
            extra = () if self.sinks is None else self.sinks(q, scale)
            reach = {"window": config.window, "sinks": config.sinks, "scale": scale}
            out, kept = attend(sequence, sink_attention, q, k, v, *extra, past=past, **reach)
            branches.append(out)
            after |= kept
        elif config.window:
            out, kept = attend(sequence, softmax_attention, q, k, v, past=past, window=config.window, **options)
            branches.append(out)
            after |= kept
        if config.full:
            out, kept = attend(sequence, softmax_attention, q, k, v, past=past, prefix="full_", **options)
            branches.append(out)
            after |= kept
        normed = [norm(branch) for norm, branch in zip(self.norms, branches, strict=True)]
        return self.read_out(torch.stack(normed).sum(0).unflatten(2, (-1, self.key)), gate), after

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past: Past, sequence: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        """The linear branch: what `q: [B,T,H,K]` reads of `k, v: [B,T,G,K]`, and its state."""
        if self.forget is None:
            # The logarithm of 1 - sigmoid(k).
            decay = log_forget(-k)
        else:
            decay = log_forget(self.forget(x), self.config.gate_temperature).unflatten(2, (-1, self.key))
        q, k = self.feature_map(q), self.feature_map(k)
        memory = past.get("memory")
        return run_grouped(sequence, linear_attention, q, k, v, decay, scale=self.key**-0.5, past=memory)
