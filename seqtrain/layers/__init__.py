"""Public parts of layers: norms, short convolution, projections, gates, rotary embedding, feature maps."""

from seqtrain.layers.convolution import ShortConvolution, token_shift
from seqtrain.layers.feature_maps import FEATURE_MAPS, elu, taylor2
from seqtrain.layers.gates import complement, log_forget, reset_decay_rate, reset_step_bias, step_sizes
from seqtrain.layers.norms import NORM_EPS, HeadLayerNorm, HeadNorm, RMSNorm, l2norm, upcast
from seqtrain.layers.projections import HeadProjections, LowRank
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
    "complement",
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
