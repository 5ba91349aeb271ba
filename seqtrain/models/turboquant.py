"""TurboQuant: rows of numbers in a few bits each, by a rule that needs no data (Zandieh et al. 2025, arXiv 2504.19874).

A row is turned by a random rotation. Whatever it was, its coordinates then follow one law, that of a point on a sphere,
and each is rounded to the codebook that is best for it (Lloyd and Max). The squared error is at most `sqrt(3) pi / 2 *
4^-bits` of the row's own, and no method can be below `4^-bits`: 0.117, 0.03 and 0.009 at 2, 3 and 4 bits.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Points at which the coordinates' law is looked at.
GRID = 20001
# Rows are cut into equal parts of at most so many numbers, which are turned by matrices of that size.
LONGEST = 128
SCALE_BYTES = torch.float32.itemsize


class TurboQuant:
    """Rows of `width` numbers as `bits` bits for each and a factor for all (the paper's algorithms 1 and 2).

    `unbiased`: one of the bits is the sign of a random projection of what rounding left (QJL), which makes inner
    products with other rows right in the mean, at a larger error. Otherwise a row keeps its length: rounding it again
    and again changes it no more, where the paper's own factor makes it shorter each time.
    """

    def __init__(self, width: int, bits: int, *, unbiased: bool = False):
        if bits < 1 + unbiased:
            raise ValueError(f"bits={bits}: expected at least {1 + unbiased}")
        self.width, self.bits, self.unbiased = width, bits, unbiased
        self._planes = bits - unbiased
        self.code = codebook(width, self._planes).float()
        self._borders = (self.code[1:] + self.code[:-1]) / 2
        self._turn = rotation(width)
        self._project = projection(width) if unbiased else None

    @property
    def row_bytes(self) -> int:
        """Of a row that is packed."""
        return self.bits * math.ceil(self.width / 8) + SCALE_BYTES * (1 + self.unbiased)

    def pack(self, x: Tensor) -> Tensor:
        """`[...,width]` of any real dtype -> uint8 `[...,row_bytes]`."""
        x = x.float()
        length = x.norm(dim=-1, keepdim=True)
        turned = x @ self._turn.to(x.device).T
        # A row of zeros has no direction; whichever it is given, its factor is 0.
        unit = turned * (math.sqrt(self.width) / length.clamp(min=torch.finfo(torch.float32).tiny))
        places = torch.bucketize(unit, self._borders.to(x.device)).to(torch.uint8)
        near = self.code.to(x.device)[places.long()]
        if self._project is None:
            scale = length / near.norm(dim=-1, keepdim=True)
            return torch.cat([_planes(places, self.bits), _as_bytes(scale)], -1)
        scale = (turned * near).sum(-1, keepdim=True) / near.square().sum(-1, keepdim=True)
        left = turned - scale * near
        signs = (left @ self._project.to(x.device).T > 0).to(torch.uint8)
        rest = left.norm(dim=-1, keepdim=True)
        planes = [_planes(places, self._planes), _planes(signs, 1)]
        return torch.cat([*planes, _as_bytes(scale), _as_bytes(rest)], -1)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 `[...,row_bytes]` -> float32 `[...,width]`."""
        bytes_ = math.ceil(self.width / 8)
        planes, factors = packed.split([self.bits * bytes_, packed.shape[-1] - self.bits * bytes_], -1)
        scale, *rest = _from_bytes(factors).split(1, -1)
        places = _from_planes(planes[..., : self._planes * bytes_], self._planes, self.width)
        turned = scale * self.code.to(packed.device)[places.long()]
        if self._project is not None:
            signs = _from_planes(planes[..., self._planes * bytes_ :], 1, self.width).float().mul_(2).sub_(1)
            turned += (math.sqrt(math.pi / 2) / self.width) * rest[0] * (signs @ self._project.to(packed.device))
        return turned @ self._turn.to(packed.device)


@cache
def codebook(width: int, bits: int) -> Tensor:
    """The `2^bits` numbers, float64, that coordinates of random rows of length `sqrt(width)` are best rounded to.

    Each is the mean of what is nearest to it under the law of a coordinate (the paper's lemma 1), `(1 - x^2 /
    width)^((width - 3) / 2)`, which is a normal one's for wide rows.
    """
    edge = math.sqrt(width)
    grid = torch.linspace(-1, 1, GRID, dtype=torch.float64)[1:-1] * min(edge, 8.0)
    weight = (1 - grid.square() / width).clamp(min=0).pow((width - 3) / 2)
    # From places that divide the mass evenly, a few rounds suffice.
    mass = weight.cumsum(0) / weight.sum()
    code = grid[torch.searchsorted(mass, (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)]
    for _ in range(300):
        nearest = torch.bucketize(grid, (code[1:] + code[:-1]) / 2)
        total, moment = (torch.zeros_like(code).index_add_(0, nearest, part) for part in (weight, weight * grid))
        code = moment / total
    return code


@cache
def rotation(width: int) -> Tensor:
    """A random rotation, float32 `[width,width]`, the same in every process."""
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


@cache
def projection(width: int) -> Tensor:
    """A matrix of normal numbers, float32 `[width,width]`, the same in every process."""
    return torch.randn(width, width, generator=torch.Generator().manual_seed(2 * width + 1))


def parts_of(width: int) -> int:
    """How long the equal parts are that a row of so many numbers is cut into; 0: it has none of 8 to 128."""
    return next((part for part in range(min(width, LONGEST), 7, -1) if width % part == 0), 0)


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Numbers below `2^bits`, uint8 `[...,W]`, as their bits: first all the lowest ones, eight a byte."""
    codes = F.pad(codes, (0, -codes.shape[-1] % 8))
    planes = torch.stack([(codes >> bit) & 1 for bit in range(bits)], -2).unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (planes * weights).sum(-1, dtype=torch.uint8).flatten(-2)


def _from_planes(packed: Tensor, bits: int, width: int) -> Tensor:
    planes = packed.unflatten(-1, (bits, -1))[..., None]
    ones = (planes >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1  # ... bits W/8 8
    weights = 1 << torch.arange(bits, device=packed.device, dtype=torch.uint8)
    codes = (ones.flatten(-2) * weights[:, None]).sum(-2, dtype=torch.uint8)
    return codes[..., :width]


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _from_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float32)
