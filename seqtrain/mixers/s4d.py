"""S4D (Gu et al. 2022, arXiv 2206.11893): a diagonal state-space system for every channel."""

import math
from typing import Literal

import torch
from torch import Tensor

from seqtrain.initialization import cpu_normal
from seqtrain.mixers.common.ssm import ChannelwiseMixer


class S4D(ChannelwiseMixer):
    """`L_n = -1/2 + i pi n` (lin), `-1/2 + i N/pi (N/(2n+1) - 1)` (inv), or HiPPO-LegS's normal part (legs)."""

    class Config(ChannelwiseMixer.Config):
        # What the eigenvalues start from: lin, inv (the paper's section 4) or legs (the matrix that inv approximates).
        initialization: Literal["lin", "inv", "legs"] = "lin"

    def eigenvalues(self) -> Tensor:
        if self.config.initialization == "legs":
            return super().eigenvalues()
        states = self.config.state
        n = torch.arange(states // 2, dtype=torch.float64, device="cpu")
        lin = self.config.initialization == "lin"
        frequency = math.pi * n if lin else states / math.pi * (states / (2 * n + 1) - 1)
        return torch.complex(torch.full_like(frequency, -0.5), frequency)

    def initial_readout(self, count: int, generator: torch.Generator | None) -> Tensor:
        if self.config.initialization == "legs":
            return super().initial_readout(count, generator)
        return cpu_normal(generator, count, self.config.state // 2, dtype=torch.complex128)
