"""Small experiments that show a layer doing what its paper claims, one file each: `ROW` in it describes the experiment.

from experiments.fidelity import ROWS, Effort
figures = list(ROWS["parity"].measure(Effort(seeds=(0,))))
"""

from experiments.fidelity import (
    all_scan,
    bounded_entries,
    centrality,
    clouds,
    digits,
    dydila,
    entropy,
    first_token,
    fourier,
    groups,
    heads,
    inverse_permutation,
    liger,
    match3,
    nalaformer,
    optimizers,
    parity,
    query_gradient,
    recall,
    rounding,
    spark,
    steps,
    tcnca,
    tensor_time,
)
from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row, joined

_MODULES = (
    *(recall, parity, match3, fourier, query_gradient, entropy, tensor_time),
    *(nalaformer, dydila, tcnca, liger, heads, bounded_entries, groups, centrality, rounding, steps, all_scan),
    *(first_token, spark, clouds, digits, optimizers),
    inverse_permutation,
)
ROWS: dict[str, Row] = {module.ROW.name: module.ROW for module in _MODULES}

__all__ = ["ROWS", "Axes", "Bounds", "Curve", "Effort", "Figure", "Row", "joined"]
