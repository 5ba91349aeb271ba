"""From a config to a trained model: the ranks, the steps, checkpoints, and what people see of them."""

from seqtrain.runtime.checks import check
from seqtrain.runtime.resolving import read_pretrain_config
from seqtrain.runtime.run import run
from seqtrain.runtime.settings import PretrainConfig

__all__ = ["PretrainConfig", "check", "read_pretrain_config", "run"]
