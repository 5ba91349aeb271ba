"""HiPPO-LegS, its normal part and its perturbation as systems with one input and one output, to compare answers.

systems = legs_systems(64, perturbation=0.1)
error = systems["normal"].output(u, 0.01) - systems["hippo"].output(u, 0.01)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.mixers.common.hippo import hippo_legs, rank_one, sized_legs


@dataclass(frozen=True)
class StateSystem:
    """`x' = A x + B u`, `y = C x` with one input and one output, in real matrices: `a: [P,P]`, `b: [P]`, `c: [P]`."""

    a: Tensor
    b: Tensor
    c: Tensor

    def response(self, frequency: Tensor) -> Tensor:
        """The transfer function on the imaginary axis, `C (i w - A)^-1 B`: float `[F]` -> complex128 `[F]`."""
        wide = torch.complex128
        eye = torch.eye(self.a.shape[0], dtype=wide)
        matrices = 1j * frequency.to(torch.float64)[:, None, None] * eye - self.a.to(wide)
        return torch.linalg.solve(matrices, self.b.to(wide).expand(len(frequency), -1)) @ self.c.to(wide)

    def output(self, u: Tensor, step: float) -> Tensor:
        """The answer to the input `u`, float64 `[T]`, held constant for `step` units of time a token: `[T]`."""
        size = self.a.shape[0]
        # Zero-order hold by the exponential of the augmented matrix.
        augmented = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        augmented[:size, :size], augmented[:size, size] = self.a * step, self.b * step
        discrete = torch.linalg.matrix_exp(augmented)
        a, b = discrete[:size, :size], discrete[:size, size]
        x, out = torch.zeros(size, dtype=torch.float64), []
        for value in u.to(torch.float64):
            x = a @ x + b * value
            out.append(self.c @ x)
        return torch.stack(out)


def legs_systems(size: int, perturbation: float, c: Tensor | None = None) -> dict[str, StateSystem]:
    """What the initialisations stand for, by name: "hippo" itself, its "normal" part (S4D, S5), "perturbed" (PTD).

    All have HiPPO's B, halved for the normal part, which then tends to HiPPO as its size grows (S4D, theorem 3), and
    one C: `c`, float64 `[P]`, by default normal numbers of variance `1/P` from a fixed seed. `perturbation`: |E| / |A|.
    """
    a, b = hippo_legs(size)
    if c is None:
        c = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / math.sqrt(size)
    added = rank_one(size)
    return {
        "hippo": StateSystem(a, b, c),
        "normal": StateSystem(a + added, b / 2, c),
        "perturbed": StateSystem(a + sized_legs(size, perturbation).share * added, b, c),
    }
