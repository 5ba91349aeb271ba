"""Liger with HGRN2's recurrence (arXiv 2503.01496): what is forgotten makes room."""

import torch
from torch import Tensor

from seqtrain.layers import log_forget
from seqtrain.mixers.common.liger import Liger


class LigerHGRN2(Liger):
    """`S_t = diag(sigmoid(k_t)) S_{t-1} + (1 - sigmoid(k_t))^T v_t`."""

    def gated(self, k: Tensor) -> tuple[Tensor, Tensor]:
        decay = log_forget(k)
        return -torch.expm1(decay), decay
