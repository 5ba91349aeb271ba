"""Small experiments that show a layer doing what its paper claims, one file each: `ROW` in it describes the experiment.

from experiments.fidelity import ROWS, Effort
figures = list(ROWS["parity"].measure(Effort(seeds=(0,))))
"""

from experiments.fidelity import entropy, fourier, match3, parity, query_gradient, recall, tensor_time
from experiments.fidelity.results import Axes, Bounds, Curve, Effort, Figure, Row, joined

_MODULES = (recall, parity, match3, fourier, query_gradient, entropy, tensor_time)
ROWS: dict[str, Row] = {module.ROW.name: module.ROW for module in _MODULES}

__all__ = ["ROWS", "Axes", "Bounds", "Curve", "Effort", "Figure", "Row", "joined"]
