"""The operators: pure functions of tensors, each with a definition and faster forms of it (DESIGN.md 4.1).

Every recurrent operator takes `initial_state` and `cu_seqlens` and returns `(out, final_state)`.
"""

from seqtrain.kernels.delay import delay
from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.diagonal_scan import diagonal_scan
from seqtrain.kernels.diagonal_system import diagonal_system
from seqtrain.kernels.gated_norm import gated_norm
from seqtrain.kernels.linear_attention import linear_attention
from seqtrain.kernels.linear_cross_entropy import linear_cross_entropy
from seqtrain.kernels.short_convolution import short_convolution
from seqtrain.kernels.sink_attention import sink_attention
from seqtrain.kernels.slot_scores import slot_scores
from seqtrain.kernels.softmax_attention import softmax_attention
from seqtrain.kernels.tensor_attention import feature_count, tensor_attention
from seqtrain.kernels.ttt_linear import ttt_linear

__all__ = [
    "delay",
    "delta_rule",
    "diagonal_scan",
    "diagonal_system",
    "feature_count",
    "gated_norm",
    "linear_attention",
    "linear_cross_entropy",
    "short_convolution",
    "sink_attention",
    "slot_scores",
    "softmax_attention",
    "tensor_attention",
    "ttt_linear",
]
