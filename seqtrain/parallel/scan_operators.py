"""The scan as PyTorch operators, so that it compiles, differentiates and is saved by activation checkpointing.

A scan is two operators, `scan_start` and `scan_wait`, joined by a ticket: PyTorch may compute between them, forward and
backward. The ticket is a float64 number, because autograd only joins operators through floating tensors: the gradient
of a forward scan's ticket is the ticket of its backward scan.
Groups go by name, since operators take no process groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape, transition_gradient, transpose
from seqtrain.parallel.cost import plan_scan
from seqtrain.parallel.engine import Engine, Job, Signature, check_in, check_out, engine_of


@torch.library.custom_op("seqtrain::scan_open", mutates_args=())
def _scan_open(
    transition_shape: Sequence[int] | None,
    update_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group_name: str,
    algorithm: str,
    blocks: int | None,
) -> Tensor:
    shape = AffineShape.of(update_shape, transition_shape)
    return _ticket(_open(engine_of(group_name), shape, dtype, device, algorithm, blocks, reverse=False))


@torch.library.custom_op("seqtrain::scan_start", mutates_args=())
def _scan_start(
    opened: Tensor | None,
    transition: Tensor | None,
    update: Tensor,
    initial_state: Tensor | None,
    group_name: str,
    algorithm: str,
    blocks: int | None,
) -> Tensor:
    engine = engine_of(group_name)
    shape = _shape(transition, update)
    if opened is None:
        job = _open(engine, shape, update.dtype, update.device, algorithm, blocks, reverse=False)
    else:
        job = check_out(int(opened.item()))
    own = AffineMap(shape.transition(transition), shape.state(update))
    first = None if initial_state is None else shape.state(initial_state)
    engine.start(job, own, first)
    return _ticket(job)


@torch.library.custom_op("seqtrain::scan_wait", mutates_args=())
def _scan_wait(
    ticket: Tensor, transition: Tensor | None, update: Tensor, group_name: str, algorithm: str, blocks: int | None
) -> tuple[Tensor, Tensor]:
    state_in, final_state = check_out(int(ticket.item())).result()
    return state_in.view(update.shape), final_state.view(update.shape)


@torch.library.custom_op("seqtrain::scan_start_backward", mutates_args=())
def _scan_start_backward(
    transition: Tensor | None,
    state_in: Tensor,
    state_gradient: Tensor,
    final_gradient: Tensor | None,
    group_name: str,
    algorithm: str,
    blocks: int | None,
) -> Tensor:
    """Starts the scan of gradients. With `D` and `F` the gradients of `state_in` and `final_state` from inside this
    rank, the gradient `G` that comes from the next rank goes on as `transition^T(G + F) + D`: an affine map again.
    """
    engine = engine_of(group_name)
    shape = _shape(transition, state_gradient)
    job = _open(engine, shape, state_gradient.dtype, state_gradient.device, algorithm, blocks, reverse=True)
    own = AffineMap(transpose(shape.transition(transition)), shape.state(state_gradient))
    if final_gradient is not None:
        own = AffineMap(own.transition, own.apply(shape.state(final_gradient)))
    engine.start(job, own, None)
    job.forward = (state_in, final_gradient)
    return _ticket(job)


@torch.library.custom_op("seqtrain::scan_wait_backward", mutates_args=())
def _scan_wait_backward(
    ticket: Tensor,
    transition_shape: Sequence[int] | None,
    update_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of update, transition (empty where there is none) and initial state."""
    job = check_out(int(ticket.item()))
    assert job.forward is not None, "a scan of gradients knows the states of its forward scan"
    state_in, final_gradient = job.forward
    shape = job.signature.shape
    arrived, leaving = (state.view(update_shape) for state in job.result())
    d_update = arrived.clone() if final_gradient is None else arrived + final_gradient
    if transition_shape is None:
        d_transition = d_update.new_empty(0)
    else:
        d_transition = transition_gradient(shape.state(d_update), shape.state(state_in)).view(transition_shape)
    # The scan of gradients ends at the group's first rank, the only one whose initial state was read.
    d_initial = leaving if engine_of(group_name).rank == 0 else torch.zeros_like(leaving)
    return d_update, d_transition, d_initial


def _open(
    engine: Engine,
    shape: AffineShape,
    dtype: torch.dtype,
    device: torch.device,
    algorithm: str,
    blocks: int | None,
    *,
    reverse: bool,
) -> Job:
    plan = plan_scan(engine, shape, dtype, device, algorithm, blocks)
    engine.scans += 1
    return engine.open(Signature(shape, dtype, plan, reverse), device)


def _ticket(job: Job) -> Tensor:
    return torch.tensor([check_in(job)], dtype=torch.float64)


def _shape(transition: Tensor | None, update: Tensor) -> AffineShape:
    return AffineShape.of(update.shape, None if transition is None else transition.shape)


@_scan_open.register_fake
def _(transition_shape, update_shape, dtype, device, group_name, algorithm, blocks):
    return torch.empty(1, dtype=torch.float64)


@_scan_start.register_fake
def _(opened, transition, update, initial_state, group_name, algorithm, blocks):
    return torch.empty(1, dtype=torch.float64)


@_scan_wait.register_fake
def _(ticket, transition, update, group_name, algorithm, blocks):
    return torch.empty(update.shape, dtype=update.dtype, device=update.device), torch.empty(
        update.shape, dtype=update.dtype, device=update.device
    )


@_scan_start_backward.register_fake
def _(transition, state_in, state_gradient, final_gradient, group_name, algorithm, blocks):
    return torch.empty(1, dtype=torch.float64)


@_scan_wait_backward.register_fake
def _(ticket, transition_shape, update_shape, dtype, device, group_name):
    like_update = {"size": tuple(update_shape), "dtype": dtype, "device": device}
    shape = (0,) if transition_shape is None else tuple(transition_shape)
    d_transition = torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(**like_update), d_transition, torch.empty(**like_update)


def _remember_start(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, transition, update, initial_state, ctx.group_name, _, _ = inputs
    ctx.transition_shape = None if transition is None else transition.shape
    ctx.update_shape, ctx.dtype, ctx.device = update.shape, update.dtype, update.device
    ctx.has_initial_state = initial_state is not None


def _start_gradients(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
    d_update, d_transition, d_initial = torch.ops.seqtrain.scan_wait_backward(
        ticket, ctx.transition_shape, ctx.update_shape, ctx.dtype, ctx.device, ctx.group_name
    )
    return (
        None,
        None if ctx.transition_shape is None else d_transition,
        d_update,
        d_initial if ctx.has_initial_state else None,
        None,
        None,
        None,
    )


def _remember_wait(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, transition, _, ctx.group_name, ctx.algorithm, ctx.blocks = inputs
    ctx.save_for_backward(transition, output[0])
    ctx.set_materialize_grads(False)


def _wait_gradients(
    ctx: Any, state_gradient: Tensor | None, final_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    transition, state_in = ctx.saved_tensors
    if state_gradient is None:
        state_gradient = torch.zeros_like(state_in)
    ticket = torch.ops.seqtrain.scan_start_backward(
        transition, state_in, state_gradient, final_gradient, ctx.group_name, ctx.algorithm, ctx.blocks
    )
    return ticket, None, None, None, None, None


_scan_start.register_autograd(_start_gradients, setup_context=_remember_start)
_scan_wait.register_autograd(_wait_gradients, setup_context=_remember_wait)

# What must run once a scan: activation checkpointing keeps their results.
COMMUNICATE = (
    torch.ops.seqtrain.scan_open.default,
    torch.ops.seqtrain.scan_start.default,
    torch.ops.seqtrain.scan_wait.default,
)
