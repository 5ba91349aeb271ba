"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): a memory that corrects what it holds instead of adding to it."""

from dataclasses import dataclass

from seqtrain.mixers._delta import DeltaConfig, DeltaMixer


class DeltaNet(DeltaMixer):
    """The delta rule without decay; each head's output is normalised, not gated."""

    @dataclass(frozen=True)
    class Config(DeltaConfig):
        pass
