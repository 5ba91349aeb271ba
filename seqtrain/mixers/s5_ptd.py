"""S5-PTD (Yu et al. 2023, arXiv 2310.01698): S5 started from HiPPO itself, perturbed a little and diagonalised."""

from dataclasses import dataclass

from seqtrain.mixers.common.ssm import PerturbationConfig, PerturbedStart, SharedConfig, SharedMixer


class S5PTD(PerturbedStart, SharedMixer):
    """S5 started from `HiPPO-LegS + E`.

    It forgets sooner than S5 at the same steps dt: the real parts of HiPPO's P = states / blocks eigenvalues have the
    mean -(P + 1) / 2, which a small E can't change, and those of its normal part are all -1/2. States that answer to
    fast waves are damped most. Longer memories have to be learned, which goes best from shorter rows to longer ones.
    """

    @dataclass(frozen=True)
    class Config(PerturbationConfig, SharedConfig):
        pass

    config: Config
