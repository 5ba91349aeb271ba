"""From a pretrained Transformer to a recurrent or hybrid model."""

from seqtrain.convert.run import convert
from seqtrain.convert.settings import ConvertConfig, read_convert_config
from seqtrain.convert.stages import Stopped

__all__ = ["ConvertConfig", "Stopped", "convert", "read_convert_config"]
