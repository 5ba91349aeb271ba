"""What decay does inside a chunk, forward and backward: the part that linear attention and the delta rule share.

With `b` the running sum of log decays inside a chunk, rows x (queries; the delta rule's keys too) and keys k give

    pairs_ij = (x_i * e^{b_i - b_j}) . k_j  for i > j (and i = j for queries)     between tokens of the chunk
    rows_i   = x_i * e^{b_i}                                                      what reads the incoming state
    keys_j   = k_j * e^{b_C - b_j}                                                what writes the outgoing state
    factor   = e^{b_C}                                                            what is left of the incoming state

Nothing but a difference `b_i - b_j` with `i >= j` is ever exponentiated, so every factor lies in [0, 1], and nothing is
divided by a decay. Tensors are `[R, C, K]`, R being chunks x heads; C is a power of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A log decay whose exponential is zero in every dtype. In a running sum, what is smaller would leave nothing of others.
FORGOTTEN = -800.0


@dataclass
class Products:
    """`pairs`: `[R,C,C]` per row set, zero above the diagonal; `rows`: `[R,C,K]` per row set; `keys`: `[R,C,K]`;
    `factor`: None (1), `[R,1,1]` or `[R,K,1]`."""

    pairs: list[Tensor]
    rows: list[Tensor]
    keys: Tensor
    factor: Tensor | None


def decayed_products(rows: Sequence[Tensor], keys: Tensor, log_decay: Tensor | None) -> Products:
    """The module's four products. The first row set pairs with its own token's key, the others only with earlier ones.

    rows: tensors `[R,C,K]`. keys: `[R,C,K]`. log_decay: None, `[R,C]` or `[R,C,K]`, at most 0.
    """
    if log_decay is not None and log_decay.dim() == 3:
        return _by_channel(rows, keys, log_decay)
    if log_decay is None:
        weights, from_start, to_end, factor = None, None, None, None
    else:
        weights, from_start, to_end, factor = _scalar_factors(log_decay)
    pairs = []
    for n, x in enumerate(rows):
        pair = x @ keys.mT
        if weights is not None:
            pair *= weights
        pairs.append(pair.tril_(-1 if n else 0))
    if from_start is None or to_end is None:
        return Products(pairs, list(rows), keys, None)
    return Products(pairs, [x * from_start for x in rows], keys * to_end, factor)


def decayed_products_backward(
    rows: Sequence[Tensor], keys: Tensor, log_decay: Tensor | None, products: Products, gradients: Products
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Gradients of `rows` (one each), `keys` and `log_decay`, given `gradients` of the products.

    Entries of `gradients.pairs` that no product has (above the diagonal) are ignored. Overwrites `gradients`.
    """
    for n, gradient in enumerate(gradients.pairs):
        gradient.tril_(-1 if n else 0)
    if log_decay is not None and log_decay.dim() == 3:
        return _by_channel_backward(rows, keys, log_decay, products, gradients)
    d_log = None
    if log_decay is not None:
        weights, from_start, to_end, _ = _scalar_factors(log_decay)
        d_log = _scalar_decay_gradient(products, gradients)
        for pair in gradients.pairs:
            pair *= weights
        for x in gradients.rows:
            x *= from_start
        gradients.keys *= to_end
    d_keys = gradients.keys
    for x, d_x, d_pair in zip(rows, gradients.rows, gradients.pairs, strict=True):
        d_x.baddbmm_(d_pair, keys)
        d_keys.baddbmm_(d_pair.mT, x)
    return gradients.rows, d_keys, d_log


def _scalar_factors(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`e^{b_i - b_j}` `[R,C,C]` (1 above the diagonal); `e^b` and `e^{b_C - b}` `[R,C,1]`; `e^{b_C}` `[R,1,1]`."""
    # In float64: strong decays take b into the thousands, where a float32 difference is wrong by 1e-4.
    b = log_decay.to(torch.float64).clamp(min=FORGOTTEN).cumsum(-1)
    weights = (b[:, :, None] - b[:, None, :]).to(log_decay.dtype).clamp_(max=0).exp_()
    from_start = b.to(log_decay.dtype).exp()[..., None]
    to_end = (b[:, -1:] - b).to(log_decay.dtype).exp_()[..., None]
    return weights, from_start, to_end, from_start[:, -1:]


def _scalar_decay_gradient(products: Products, gradients: Products) -> Tensor:
    """Gradient of `log_decay [R,C]`, each product's share from the product itself, so that no factor is divided out."""
    inside = products.pairs[0] * gradients.pairs[0]
    # A token's product with its own key holds no decay; left in, it would cancel only up to rounding.
    inside.diagonal(dim1=1, dim2=2).zero_()
    for pair, d_pair in zip(products.pairs[1:], gradients.pairs[1:], strict=True):
        inside.addcmul_(pair, d_pair)
    # The decay of token t lies between every i >= t and j < t. Each running sum goes over just those: a total less the
    # rest would drown strong decays in the rounding of what does not decay.
    inside = inside.cumsum(2).tril_(-1).sum(1)
    read = torch.stack([(x * d_x).sum(-1) for x, d_x in zip(products.rows, gradients.rows, strict=True)]).sum(0)
    written = (products.keys * gradients.keys).sum(-1)
    assert products.factor is not None
    assert gradients.factor is not None
    d_log = read.flip(1).cumsum(1).flip(1) + (products.factor * gradients.factor)[:, :, 0]
    d_log[:, 1:] += written.cumsum(1)[:, :-1] + inside[:, :-1]
    return d_log


def _by_channel(rows: Sequence[Tensor], keys: Tensor, log_decay: Tensor) -> Products:
    """Per-channel decay by recursive halving: blocks of 1, 2, 4 ... C tokens, each re-centred on its own middle.

    At width s, `rows_i` holds the decay from its block's start and `keys_j` to its block's end. Tokens of a right block
    meet those of the block to its left in one small matrix product, then both are extended over their neighbour.
    """
    decay = log_decay.exp()
    ends = keys.clone()
    starts = [x * decay for x in rows]
    pairs = [keys.new_zeros(*keys.shape[:2], keys.shape[1]) for _ in rows]
    pairs[0].diagonal(dim1=1, dim2=2).copy_((rows[0] * keys).sum(-1))
    whole, width = decay, 1
    while width < keys.shape[1]:
        first, second = whole.unflatten(1, (-1, 2)).unsqueeze(3).unbind(2)  # R blocks 1 K
        left = _blocks(ends, width)[:, :, 0]
        for x, pair in zip(starts, pairs, strict=True):
            right = _blocks(x, width)[:, :, 1]
            _corners(pair, width).copy_((right.flatten(0, 1) @ left.flatten(0, 1).mT).view(*right.shape[:3], width))
            right *= first
        left *= second
        whole, width = (first * second).squeeze(2), 2 * width
    return Products(pairs, starts, ends, whole.mT)


def _by_channel_backward(
    rows: Sequence[Tensor], keys: Tensor, log_decay: Tensor, products: Products, gradients: Products
) -> tuple[list[Tensor], Tensor, Tensor]:
    decay = log_decay.exp()
    from_start, to_end = decay.clone(), torch.ones_like(decay)
    d_rows, d_keys = [torch.zeros_like(x) for x in rows], torch.zeros_like(keys)
    whole, width = decay, 1
    while width < keys.shape[1]:
        first, second = whole.unflatten(1, (-1, 2)).unsqueeze(3).unbind(2)  # R blocks 1 K
        right_factor, left_factor = _blocks(from_start, width)[:, :, 1], _blocks(to_end, width)[:, :, 0]
        left = (_blocks(keys, width)[:, :, 0] * left_factor).flatten(0, 1)
        for x, d_x, d_pair in zip(rows, d_rows, gradients.pairs, strict=True):
            right = (_blocks(x, width)[:, :, 1] * right_factor).flatten(0, 1)
            corner = _corners(d_pair, width).flatten(0, 1)
            _blocks(d_x, width)[:, :, 1].addcmul_((corner @ left).view_as(right_factor), right_factor)
            _blocks(d_keys, width)[:, :, 0].addcmul_((corner.mT @ right).view_as(left_factor), left_factor)
        right_factor *= first
        left_factor *= second
        whole, width = (first * second).squeeze(2), 2 * width
    d_b = -keys * d_keys
    for x, d_x, d_row in zip(rows, d_rows, gradients.rows, strict=True):
        d_b.addcmul_(x, d_x.addcmul_(d_row, from_start))
    d_keys.addcmul_(gradients.keys, to_end)
    assert products.factor is not None
    assert gradients.factor is not None
    # Running sums as products with ones (faster here than flip, cumsum, flip): of d_b from token t on, and of what
    # the keys before t give the outgoing state, as in `_scalar_decay_gradient`.
    ones = torch.ones_like(products.pairs[0])
    d_log = torch.bmm(ones.triu(), d_b).baddbmm_(ones.tril_(-1), products.keys * gradients.keys)
    d_log += (products.factor * gradients.factor).mT
    own = gradients.pairs[0].diagonal(dim1=1, dim2=2)[..., None]
    d_rows[0].addcmul_(own, keys)
    d_keys.addcmul_(own, rows[0])
    return d_rows, d_keys, d_log


def _blocks(x: Tensor, width: int) -> Tensor:
    """`[R,C,K]` -> a view `[R, C/(2*width), 2, width, K]`: pairs of neighbouring blocks."""
    return x.unflatten(1, (-1, 2, width))


def _corners(pairs: Tensor, width: int) -> Tensor:
    """`[R,C,C]` -> a view `[R, C/(2*width), width, width]`: rows of right blocks, columns of their left ones."""
    blocks = pairs.unflatten(2, (-1, 2, width)).unflatten(1, (-1, 2, width))
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
