"""The delta rule in chunks: the triangular solve inside a chunk, a loop of two small products over chunk states.

Symbols as in docs/math.md, section 1.2, with `beta` on the columns so that nothing is divided by it. With E the errors
before `beta`, `n = beta * E` the values really written, N the strictly lower decayed products of keys,

    inverse = (I + N diag(beta))^{-1}      E = inverse (v - (k e^b) S)      out = scale (pairs n + (q e^b) S)

Where `read` and `erase` stand for k, a token writes twice: w = beta * v along k, and n = beta * E along erase, E being
minus what the state answers to `read`. With N and pairs now products with erase, M and pairs_k those with k,

    E = -inverse (M w + (read e^b) S)      out = scale (pairs n + pairs_k w + (q e^b) S)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqtrain.kernels.chunk_form import ChunkForm, factor_gradient, layout_of, rows_of, scan_through
from seqtrain.kernels.decay import Products, decayed_products, decayed_products_backward
from seqtrain.kernels.delta_rule import delta_rule
from seqtrain.kernels.layout import Segment
from seqtrain.kernels.operator import Inputs

# Diagonal blocks of this width are inverted by forward substitution, then merged pairwise by matrix products.
BLOCK = 16


@delta_rule.backend(like=lambda inputs, state: inputs[2])
def run(inputs: Inputs, state: Tensor, cu_seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Chunked `delta_rule`."""
    return FORM.run(inputs, state, scale, layout_of(inputs[0], inputs[2], cu_seqlens))


@dataclass
class _Added:
    """What tokens write along k, where that is not where they erase."""

    k: Tensor  # [R,C,K]
    v: Tensor  # [R,C,V]
    products: Products  # of the row sets q and read with k
    written: Tensor  # [R,C,V]: beta * v


@dataclass
class _Chunks:
    """What a segment's chunks need besides the incoming state; R rows are chunks x heads."""

    q: Tensor  # [R,C,K]
    read: Tensor  # [R,C,K]: k, unless given
    erase: Tensor  # [R,C,K]: k, unless given
    beta: Tensor  # [R,C,1]
    log_decay: Tensor | None  # [R,C] or [R,C,K]
    products: Products  # of the row sets q and read with erase
    inverse: Tensor  # [R,C,C]
    reading: Tensor  # [R,C,K]: -inverse (read e^b), so that E = errors + reading S
    write: Tensor  # [R,C,K]: beta * erase e^{b_C - b}, so that S' = factor S + write^T E (+ update)
    errors: Tensor  # [R,C,V]: E's part without incoming state, inverse v or -inverse M w; the scan adds the rest
    added: _Added | None

    def update(self) -> Tensor | None:
        """What k and v add to the outgoing state besides E, `[R,K,V]`."""
        return None if self.added is None else self.added.products.keys.mT @ self.added.written


def _prepare(inputs: Inputs, segment: Segment, dtype: torch.dtype) -> tuple[_Chunks, int]:
    """The chunks of a segment, and H."""
    (q, k, v, beta, log_decay, read, erase), heads = rows_of(inputs, segment, dtype)
    asked, taken = (k, k) if read is None or erase is None else (read, erase)
    beta = beta[..., None]
    products = decayed_products([q, asked], taken, log_decay)
    inverse = unit_lower_inverse(products.pairs[1] * beta.mT)
    reading = (inverse @ products.rows[1]).neg_()
    if taken is k:
        added, errors = None, inverse @ v
    else:
        with_k = decayed_products([q, asked], k, log_decay)
        added = _Added(k, v, with_k, v * beta)
        errors = (inverse @ (with_k.pairs[1] @ added.written)).neg_()
    write = products.keys * beta
    return _Chunks(q, asked, taken, beta, log_decay, products, inverse, reading, write, errors, added), heads


def _outputs(inputs: Inputs, segment: Segment, carry: Tensor, scale: float) -> Tensor:
    c, heads = _prepare(inputs, segment, carry.dtype)
    starts = carry.new_empty(c.q.shape[0], *carry.shape[1:])
    steps = segment.steps(heads)
    scan_through(carry, steps, c.products.factor, c.reading, c.errors, c.write.mT, c.update(), starts)
    out = c.products.pairs[0] @ (c.errors * c.beta)
    if c.added is not None:
        out.baddbmm_(c.added.products.pairs[0], c.added.written)
    return out.baddbmm_(c.products.rows[0], starts, beta=scale, alpha=scale)


def _gradients(
    inputs: Inputs, segment: Segment, carry: Tensor, d_out: Tensor, d_carry: Tensor
) -> tuple[Tensor | None, ...]:
    c, heads = _prepare(inputs, segment, carry.dtype)
    starts = carry.new_empty(c.q.shape[0], *carry.shape[1:])
    steps = segment.steps(heads)
    scan_through(carry, steps, c.products.factor, c.reading, c.errors, c.write.mT, c.update(), starts)
    products, (pairs, asked_pairs) = c.products, c.products.pairs
    d_written = pairs.mT @ d_out  # gradient of n, without what reaches it through the outgoing state
    d_errors = d_written * c.beta
    d_ends = torch.empty_like(starts)
    scan_through(
        d_carry, steps[::-1], products.factor, c.write, d_errors, c.reading.mT, products.rows[0].mT @ d_out, d_ends
    )
    d_solved = c.inverse.mT @ d_errors  # gradient of what the inverse is applied to
    d_written.baddbmm_(products.keys, d_ends).baddbmm_(asked_pairs.mT, d_solved, alpha=-1)
    d_beta = torch.linalg.vecdot(d_written, c.errors)
    written = c.errors * c.beta
    d_asked = -d_solved
    d_products = Products(
        pairs=[d_out @ written.mT, d_asked @ written.mT],
        rows=[d_out @ starts.mT, d_asked @ starts.mT],
        keys=written @ d_ends.mT,
        factor=factor_gradient(products.factor, starts, d_ends),
    )
    (d_q, d_read), d_erase, d_log = decayed_products_backward([c.q, c.read], c.erase, c.log_decay, products, d_products)
    if c.added is None:
        return d_q, d_erase.add_(d_read), d_solved, d_beta, d_log, None, None
    d_added, d_k, d_v, d_beta_added, d_log_added = _added_gradients(c, c.added, d_out, d_asked, d_ends)
    if d_log is not None and d_log_added is not None:
        d_log = d_log + d_log_added
    return d_q + d_added[0], d_k, d_v, d_beta + d_beta_added, d_log, d_read + d_added[1], d_erase


def _added_gradients(
    c: _Chunks, added: _Added, d_out: Tensor, d_asked: Tensor, d_ends: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]:
    """What the writes along k give the gradients of q and read, and those of k, v, beta, log_decay.

    `d_asked`: the gradient of E before the inverse, `[R,C,V]`; `d_ends`: that of the outgoing states.
    """
    products, (pairs, asked_pairs) = added.products, added.products.pairs
    d_written = (pairs.mT @ d_out).baddbmm_(products.keys, d_ends).baddbmm_(asked_pairs.mT, d_asked)
    # The rows' and the factor's own gradients are counted with the products of erase.
    d_products = Products(
        pairs=[d_out @ added.written.mT, d_asked @ added.written.mT],
        rows=[torch.zeros_like(x) for x in products.rows],
        keys=added.written @ d_ends.mT,
        factor=None if products.factor is None else torch.zeros_like(products.factor),
    )
    d_rows, d_k, d_log = decayed_products_backward([c.q, c.read], added.k, c.log_decay, products, d_products)
    return d_rows, d_k, d_written * c.beta, torch.linalg.vecdot(d_written, added.v), d_log


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


FORM = ChunkForm(_outputs, _gradients)
