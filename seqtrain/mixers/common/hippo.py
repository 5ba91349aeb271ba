"""HiPPO-LegS, and the three ways to make it diagonal: its normal part, a small perturbation, or not at all.

HiPPO-LegS has eigenvectors whose condition number grows exponentially with its size, so it can't be diagonalised as it
is. S4D and S5 keep its normal part only. Perturb-then-diagonalize (Yu et al. 2023, arXiv 2310.01698) adds a small
matrix E first, chosen to make the eigenvectors of the sum well-conditioned: what is diagonalised is then close to
HiPPO at every frequency, which the normal part is not.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

log = logging.getLogger("seqtrain.mixers")


@dataclass(frozen=True)
class Spectrum:
    """A real matrix of even size P with complex eigenvalues only, by one of each conjugate pair of eigenvalues.

    `values`: complex128 `[P/2]`. `vectors`: `[P, P/2]`, of unit length. `inverse`: `[P/2, P]`, the rows of the inverse
    of all P eigenvectors that belong to these: a vector x has coordinates `inverse @ x`. `input`: those of B, `[P/2]`.
    """

    values: Tensor
    vectors: Tensor
    inverse: Tensor
    input: Tensor


# Compared by identity: tensors have no single truth.
@dataclass(frozen=True, eq=False)
class Perturbed(Spectrum):
    """HiPPO-LegS plus `share * p p^T`; `size`: the spectral norm of that; `condition`: of the P eigenvectors."""

    share: float
    size: float
    condition: float


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """`A: [P,P]`, `B: [P]` of HiPPO-LegS, float64: `x' = A x + B u` holds u's coordinates in Legendre polynomials."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    scale = (2 * n + 1).sqrt()
    return -torch.tril(scale[:, None] * scale, -1) - torch.diag(n + 1), scale


def rank_one(size: int) -> Tensor:
    """`p p^T: [P,P]` such that `A + p p^T` is normal (S4D, arXiv 2206.11893, section 4)."""
    p = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    return p[:, None] * p


def normal_legs(size: int) -> Spectrum:
    """The normal part of HiPPO-LegS; `size` is even. Eigenvalues have real part -1/2, eigenvectors are unitary."""
    legs, b = hippo_legs(size)
    matrix = legs + rank_one(size)
    # Normal with real part -1/2: minus i times what is skew in it is Hermitian.
    skew = (matrix - matrix.T) / 2
    frequency, vectors = torch.linalg.eigh(skew * -1j)
    values = torch.complex(torch.full_like(frequency, -0.5), frequency)[size // 2 :]
    vectors = vectors[:, size // 2 :]
    inverse = vectors.mH.resolve_conj()
    return Spectrum(values, vectors, inverse, inverse @ (b / 2).to(inverse.dtype))


@lru_cache(maxsize=32)
def sized_legs(size: int, perturbation: float) -> Perturbed:
    """HiPPO-LegS plus the `E = share * p p^T` with `|E| = perturbation * |HiPPO|`, spectral norms; `size` is even.

    Why E lies along p p^T: see `perturbed_legs`. Raises `ValueError` where the sum has a real or a growing eigenvalue.
    """
    added = rank_one(size).diagonal().sum().item()
    share = perturbation * torch.linalg.matrix_norm(hippo_legs(size)[0], 2).item() / added
    if (found := _perturb(size, share)) is None:
        raise ValueError(f"leaves HiPPO-LegS of {size} states a real or a growing eigenvalue; use 0.01 to 0.5")
    return found


@lru_cache(maxsize=32)
def perturbed_legs(size: int, tradeoff: float) -> Perturbed:
    """HiPPO-LegS plus the `E = share * p p^T` of least `condition of the eigenvectors + tradeoff * |E|`.

    `size` is even. p p^T, at share 1, makes HiPPO normal. Among perturbations those along it are the ones that hardly
    change the answer to HiPPO's own input vector, which is parallel to p:

        (s - A - E)^-1 p = (s - A)^-1 p / (1 - share * h(s)),    h(s) = p^T (s - A)^-1 p

    with h at most 1 in absolute value on the imaginary axis. Descent over all matrices E found eigenvectors twice as
    well conditioned at a smaller |E|, and moved the transfer function 100 times as far. The sum is stable and has no
    real eigenvalue.
    """

    def best(shares: Iterable[float]) -> Perturbed:
        found = filter(None, (_perturb(size, share) for share in shares))
        return min(found, key=lambda each: each.condition + tradeoff * each.size)

    # Share 1 has no real eigenvalue.
    coarse = best(0.5**halvings for halvings in range(2 * int(math.log2(size)) + 3))
    return best(coarse.share * 2 ** (quarter / 4) for quarter in (0, -3, -2, -1, 1, 2, 3))


@dataclass(frozen=True)
class Diagonalized:
    """`A + E = vectors diag(values) inverse`, complex128: `[n]`, `[n,n]`, `[n,n]`; `added`: the real E, `[n,n]`.

    `condition`: that of the eigenvectors, which have length 1.
    """

    values: Tensor
    vectors: Tensor
    inverse: Tensor
    added: Tensor
    condition: float


def perturb_then_diagonalize(a: Tensor, perturbation: float = 0.1, *, steps: int = 100, seed: int = 0) -> Diagonalized:
    """Any real matrix, diagonalizable or not, made diagonal after a perturbation of known size.

    a: real `[n,n]`. perturbation: `|E| / |A|`, spectral norms; the answer to any input changes by about as much.
    steps: of descent on `log(|V|_F |V^-1|_F)` over all E of that size, from normal numbers, whose eigenvectors alone
    already have a condition number of `4 n^1.5 (1 + 1 / perturbation)` at most (Banks et al. 2019, arXiv 1906.11819).
    The best E on the way counts; nothing keeps its eigenvalues stable. Raises `ValueError`.
    Source: Yu et al. 2023, arXiv 2310.01698, section 3.
    """
    if a.dim() != 2 or a.shape[0] != a.shape[1] or not a.is_floating_point():
        raise ValueError(f"perturb_then_diagonalize: a is {a.dtype} {tuple(a.shape)}, expected a real square matrix")
    if not perturbation > 0:
        raise ValueError(f"perturb_then_diagonalize: perturbation={perturbation}, expected more than 0")
    a = a.detach().to(torch.float64)
    size = perturbation * torch.linalg.matrix_norm(a, 2)
    free = torch.randn(a.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    free.requires_grad_()
    optimizer, best, lowest = torch.optim.Adam([free], lr=0.02), free.detach(), math.inf
    with torch.enable_grad():
        for _ in range(steps + 1):
            added = size * free / torch.linalg.matrix_norm(free, 2)
            vectors = torch.linalg.eig(a + added).eigenvectors
            loss = (torch.linalg.matrix_norm(vectors) * torch.linalg.matrix_norm(torch.linalg.inv(vectors))).log()
            if loss.item() < lowest:
                best, lowest = added.detach(), loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    values, vectors = torch.linalg.eig(a + best)
    return Diagonalized(values, vectors, torch.linalg.inv(vectors), best, torch.linalg.cond(vectors).item())


@cache
def report_perturbation(size: int, found: Perturbed) -> None:
    """Logs, once a process, what HiPPO-LegS of `size` states was perturbed by."""
    norm = torch.linalg.matrix_norm(hippo_legs(size)[0], 2).item()
    log.info(
        "HiPPO-LegS of %d states perturbed by %.3g, %.2g of its norm: condition number of the eigenvectors %.3g",
        *(size, found.size, found.size / norm, found.condition),
    )


def _perturb(size: int, share: float) -> Perturbed | None:
    """HiPPO-LegS plus `share * p p^T` diagonalised; None where an eigenvalue is real or grows."""
    (legs, b), added = hippo_legs(size), rank_one(size)
    values, vectors = torch.linalg.eig(legs + share * added)
    half = values.imag > 0
    if 2 * int(half.sum()) != len(values) or not (values.real < 0).all():
        return None
    inverse = torch.linalg.inv(vectors)[half]
    return Perturbed(
        *(values[half], vectors[:, half], inverse, inverse @ b.to(inverse.dtype)),
        share=share,
        size=share * added.diagonal().sum().item(),
        condition=torch.linalg.cond(vectors).item(),
    )
