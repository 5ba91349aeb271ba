"""QRNN (Bradbury et al. 2016, arXiv 1611.01576): a gated RNN whose gates see the token alone, so that it is a scan.

Copied into seqtrain/mixers/, this file is a new mixer:

    cp examples/new_mixer/qrnn.py seqtrain/mixers/
    python launch/pretrain.py 'model.layers=[qrnn]' mixer.qrnn.expand=2
"""

import torch
import torch.nn.functional as F
from torch import nn

from seqtrain.kernels import diagonal_scan
from seqtrain.layers import upcast
from seqtrain.mixers import Mixer, MixerConfig


class QRNN(Mixer):
    """`h_t = f_t h_{t-1} + (1 - f_t) tanh(W_v x_t)`, `f = sigmoid(W_f x)`, read through `sigmoid(W_g x)`."""

    class Config(MixerConfig):
        # Hidden channels over model.width.
        expand: int = 1

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.hidden = config.expand * shape.width
        self.parts = nn.Linear(shape.width, 3 * self.hidden, bias=False)
        self.out = nn.Linear(self.hidden, shape.width, bias=False)

    def mix(self, x, past, sequence):
        value, forget, gate = upcast(self.parts(x)).chunk(3, -1)
        new = torch.sigmoid(-forget) * value.tanh()  # 1 - f without cancellation
        hidden, memory = sequence.run(diagonal_scan, new, F.logsigmoid(forget), initial_state=past.get("memory"))
        return self.out((torch.sigmoid(gate) * hidden).to(x.dtype)), {"memory": memory}
