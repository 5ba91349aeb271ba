"""Liger with GLA's recurrence (arXiv 2503.01496): keys are softmaxes of keys, gates sigmoids of them."""

from torch import Tensor

from seqtrain.layers import log_forget
from seqtrain.mixers.common.liger import TEMPERATURE, Liger


class LigerGLA(Liger):
    """`S_t = diag(sigmoid(k_t)^(1/16)) S_{t-1} + softmax(k_t)^T v_t`."""

    def gated(self, k: Tensor) -> tuple[Tensor, Tensor]:
        return k.softmax(-1), log_forget(k, TEMPERATURE)
