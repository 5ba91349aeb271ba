"""S4-PTD (Yu et al. 2023, arXiv 2310.01698): a system for every channel, from HiPPO perturbed and diagonalised."""

from seqtrain.mixers.common.ssm import ChannelwiseMixer, PerturbedStart


class S4PTD(PerturbedStart, ChannelwiseMixer):
    """Every channel starts from `HiPPO-LegS + E`."""

    class Config(PerturbedStart.Config, ChannelwiseMixer.Config):
        pass
