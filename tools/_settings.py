"""Moved to `seqtrain.report` and `seqtrain.config`; gone once the tools are packages."""

from seqtrain.config import read_settings
from seqtrain.report import machine, version

__all__ = ["machine", "read_settings", "version"]
