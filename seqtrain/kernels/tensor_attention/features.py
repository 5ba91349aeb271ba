"""The features that turn the Taylor polynomial of exp into a product of three feature vectors."""

import itertools
import math
from collections import Counter
from functools import cache

import torch
from torch import Tensor

# Of the polynomial that stands for exp, where none is asked for.
DEGREE = 2


@cache
def monomials(width: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Every product of at most `degree` of `width` variables, as rising variable numbers, shortest first."""
    return tuple(
        chosen for power in range(degree + 1) for chosen in itertools.combinations_with_replacement(range(width), power)
    )


def feature_count(width: int, degree: int) -> int:
    """F, the number of monomials: `(width + degree)! / (width! degree!)`."""
    return math.comb(width + degree, degree)


@cache
def extensions(width: int, power: int, degree: int) -> tuple[list[int], list[int], list[float]]:
    """For each monomial of `power`: the one of `power - 1` it extends, the variable it adds, its weight over that
    one's.

    The weight of a monomial whose variables have multiplicities m is `prod(m!) ** (-1/3)`: three such features
    multiplied give `1 / prod(m!)`, the multinomial coefficient over p! that `x**p / p!` asks for.
    """
    names = [name for name in monomials(width, degree) if len(name) == power]
    shorter = [name for name in monomials(width, degree) if len(name) == power - 1]
    place = {name: index for index, name in enumerate(shorter)}
    # Only the multiplicity of the added variable changes, and by one.
    ratio = [Counter(name)[name[-1]] ** (-1 / 3) for name in names]
    return [place[name[:-1]] for name in names], [name[-1] for name in names], ratio


@cache
def correction(width: int, degree: int, order: int) -> Tensor:
    """By what one of `order` features is multiplied, where not three are: float64 `[F]`, see `extensions`."""
    sizes = [math.prod(map(math.factorial, Counter(name).values())) for name in monomials(width, degree)]
    return torch.tensor(sizes, dtype=torch.float64, device="cpu") ** (order / 3 - 1)


def features(x: Tensor, degree: int) -> Tensor:
    """phi of the last dimension, `[...,K] -> [...,F]`, the monomials' order that of `monomials`."""
    return torch.cat(_blocks(x.movedim(-1, 0), degree)).movedim(0, -1)


def _blocks(x: Tensor, degree: int) -> list[Tensor]:
    """The monomials of `x [K,...]` by power."""
    blocks = [torch.ones_like(x[:1])]
    for power in range(1, degree + 1):
        parent, factor, weight = _tensors(x, power, degree)
        blocks.append(blocks[-1].index_select(0, parent).mul(x.index_select(0, factor)).mul_(weight))
    return blocks


def _tensors(x: Tensor, power: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """`extensions` for `x [K,...]`."""
    shorter, added, ratio = extensions(x.shape[0], power, degree)
    weight = x.new_tensor(ratio).view(-1, *(1,) * (x.dim() - 1))
    return x.new_tensor(shorter, dtype=torch.int64), x.new_tensor(added, dtype=torch.int64), weight


def features_gradient(x: Tensor, d_phi: Tensor, degree: int) -> Tensor:
    """The gradient of `features(x, degree)`: `d_phi [...,F] -> [...,K]`."""
    x = x.movedim(-1, 0).contiguous()
    blocks = _blocks(x, degree)
    grads = list(d_phi.movedim(-1, 0).contiguous().split([block.shape[0] for block in blocks]))
    dx = torch.zeros_like(x)
    for power in range(degree, 0, -1):
        parent, factor, weight = _tensors(x, power, degree)
        grad = grads[power] * weight
        dx.index_add_(0, factor, grad * blocks[power - 1].index_select(0, parent))
        grads[power - 1].index_add_(0, parent, grad.mul_(x.index_select(0, factor)))
    return dx.movedim(0, -1)
