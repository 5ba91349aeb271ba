"""SwiGLU in a product's epilogue by a Triton kernel; the backward pass's own products are PyTorch's."""

from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels import gpu
from seqtrain.kernels.custom_ops import differentiable
from seqtrain.kernels.gpu import Launch, unavailable
from seqtrain.kernels.inspect.examples import Example
from seqtrain.kernels.linear_swiglu import linear_swiglu

__all__ = ["EXAMPLES", "run", "unavailable"]

EXAMPLES = (
    Example(
        "linear_swiglu K=512 H=1024 bfloat16",
        linear_swiglu,
        {"x": ("B T K", "bfloat16"), "weight": ("S H K", "bfloat16")},
        {"B": 1, "K": 512, "S": 2, "H": 1024},
        tokens=(256, 512),
    ),
)
# Two accumulators of 64 x 64 for each of four warps; of float32, whose products take more registers, half as many rows.
PRODUCT = Launch(warps=4, stages=3, sizes={"BR": 64, "BH": 64, "BK": 32})
WIDE = Launch(warps=4, stages=2, sizes={"BR": 32, "BH": 64, "BK": 32})
ROWS = Launch(warps=4, stages=1, sizes={"BR": 8, "BH": 128})


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See `linear_swiglu`."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _operator(rows, weight.to(x.dtype).contiguous(), keep)[0].view(*x.shape[:-1], weight.shape[1])


def _shapes(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    hidden = weight.shape[1]
    return x.new_empty(len(x), hidden), x.new_empty(len(x) if keep else 0, 2, hidden)


def _forward(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    from seqtrain.kernels.triton import epilogue

    out, z = _shapes(x, weight, keep)
    if x.numel():
        launch = PRODUCT if x.dtype.itemsize < 4 else WIDE
        grid, options = _call(launch, weight, x, KEEP=keep, PRECISION=gpu.PRECISION[gpu.target()])
        with gpu.on_device(x):
            epilogue.forward[grid](x, weight, out, z, len(x), **options)
    return out, z


def _backward(
    arguments: tuple[Any, ...], kept: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    from seqtrain.kernels.triton import epilogue

    x, weight, _ = arguments
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), None
    (z,), d_z = kept, torch.empty_like(kept[0])
    grid, options = _call(ROWS, weight, x)
    with gpu.on_device(x):
        epilogue.backward[grid](z, gradients[0].contiguous(), d_z, len(x), **options)
    rows, matrix = d_z.flatten(1), weight.flatten(0, 1)
    return rows @ matrix, (rows.T @ x).view_as(weight), None


def _call(launch: Launch, weight: Tensor, x: Tensor, **flags: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time arguments."""
    _, hidden, width = weight.shape
    accumulator = gpu.triton_dtype(torch.promote_types(x.dtype, torch.float32))
    options = launch.options(H=hidden, K=width, ACC=accumulator, **flags)
    return (-(-hidden // launch.sizes["BH"]), -(-len(x) // launch.sizes["BR"])), options


_operator = differentiable("linear_swiglu_triton", _forward, _backward, _shapes, results=1)
