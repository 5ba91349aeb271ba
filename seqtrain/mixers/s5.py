"""S5 (Smith et al. 2022, arXiv 2208.04933): one diagonal complex system with many inputs and outputs."""

from seqtrain.mixers.common.ssm import SharedMixer


class S5(SharedMixer):
    """Starts from the normal part of HiPPO-LegS."""
