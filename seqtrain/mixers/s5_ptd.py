"""S5-PTD (Yu et al. 2023, arXiv 2310.01698): S5 started from HiPPO itself, perturbed a little and diagonalised."""

from typing import Annotated

from pydantic import Field

from seqtrain.mixers.common.ssm import PerturbedStart, SharedMixer


class S5PTD(PerturbedStart, SharedMixer):
    """S5 started from `HiPPO-LegS + E`.

    It forgets sooner than S5 at the same steps dt: the real parts of HiPPO's P = states / blocks eigenvalues have the
    mean -(P + 1) / 2, which a small E can't change, and those of its normal part are all -1/2. Longer memories have to
    be learned, which goes best from shorter rows to longer ones.
    """

    class Config(PerturbedStart.Config, SharedMixer.Config):
        # Five of six seeds learned to classify long signals with blocks of 16 states (the sixth reached 0.74); with
        # 0.083 one of two, with 0.029 four.
        perturbation: Annotated[float, Field(gt=0, lt=1)] = 0.28
