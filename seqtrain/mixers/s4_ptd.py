"""S4-PTD (Yu et al. 2023, arXiv 2310.01698): a system for every channel, from HiPPO perturbed and diagonalised."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.mixers.common.hippo import hippo_legs
from seqtrain.mixers.common.ssm import (
    ChannelwiseConfig,
    ChannelwiseMixer,
    PerturbationConfig,
    PerturbedStart,
    channel_readouts,
)


class S4PTD(PerturbedStart, ChannelwiseMixer):
    """Every channel starts from `HiPPO-LegS + E`."""

    @dataclass(frozen=True)
    class Config(PerturbationConfig, ChannelwiseConfig):
        pass

    config: Config

    def initial_system(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        spectrum = self.spectrum(self.config.state)
        return spectrum.values, channel_readouts(spectrum, hippo_legs(self.config.state)[1], count, generator)
