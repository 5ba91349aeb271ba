"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): a memory that corrects what it holds instead of adding to it."""

from seqtrain.mixers.common.delta import DeltaMixer, DeltaRecurrence


class DeltaNet(DeltaMixer):
    """The delta rule without decay; each head's output is normalised, not gated."""

    recurrence = DeltaRecurrence
