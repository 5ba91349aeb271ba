"""The inverse of a unit lower triangular matrix, for the delta rule's chunks."""

import torch
from torch import Tensor

# Diagonal blocks of this width are inverted by forward substitution, then merged pairwise by matrix products.
BLOCK = 16


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """`(I + L)^{-1}` for `strict: [R,C,C]`, whose entries below the diagonal are L; the others are not read.

    C is a power of two. Forward substitution and `inv([[A, 0], [B, D]]) = [[A', 0], [-D' B A', D']]`: as stable as
    substitution over the whole matrix, unlike a Neumann series, whose terms grow to 1e9 for correlated keys.
    """
    size = strict.shape[-1]
    width = min(BLOCK, size)
    diagonal = _diagonal_blocks(strict, width)
    eye = torch.eye(width, dtype=strict.dtype, device=strict.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal.contiguous(), eye, upper=False, unitriangular=True)
    while width < size:
        first, second = inverse[:, 0::2].flatten(0, 1), inverse[:, 1::2].flatten(0, 1)
        corner = _diagonal_blocks(strict, 2 * width)[:, :, width:, :width].flatten(0, 1)
        merged = strict.new_zeros(first.shape[0], 2, width, 2, width)
        merged[:, 0, :, 0] = first
        merged[:, 1, :, 1] = second
        torch.neg((second @ corner) @ first, out=merged[:, 1, :, 0])
        width *= 2
        inverse = merged.view(strict.shape[0], -1, width, width)
    return inverse.reshape(strict.shape)


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """`[R,C,C]` -> a view `[R, C/width, width, width]` of the blocks on the diagonal."""
    blocks = matrix.unflatten(2, (-1, width)).unflatten(1, (-1, width))  # R n width n width
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
