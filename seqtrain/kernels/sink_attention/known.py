"""What the backends are told of keys and values besides the new ones."""

from dataclasses import dataclass

from torch import Tensor

from seqtrain.kernels.rows import Rows


@dataclass(frozen=True)
class Known:
    """`rows`: where the pieces of the flat row lie. `past`, `after`: the states before and after it; see
    `sink_attention`. `fresh`: no token was seen before.
    """

    rows: Rows
    past: dict[str, Tensor]
    after: dict[str, Tensor]
    fresh: bool
