"""Public parts of layers: norms, short convolution, projections, gates, rotary embedding, feature maps."""

from seqtrain.layers.gates import FEATURE_MAPS, elu, log_forget, reset_decay_rate, reset_step_bias, step_sizes, taylor2
from seqtrain.layers.norms import NORM_EPS, HeadLayerNorm, HeadNorm, RMSNorm, l2norm, upcast
from seqtrain.layers.projections import HeadProjections, LowRank, ShortConvolution, token_shift
from seqtrain.layers.rotary import positions, rotate

__all__ = [
    "FEATURE_MAPS",
    "NORM_EPS",
    "HeadLayerNorm",
    "HeadNorm",
    "HeadProjections",
    "LowRank",
    "RMSNorm",
    "ShortConvolution",
    "elu",
    "l2norm",
    "log_forget",
    "positions",
    "reset_decay_rate",
    "reset_step_bias",
    "rotate",
    "step_sizes",
    "taylor2",
    "token_shift",
    "upcast",
]
