"""All-Scan: every rank's incoming state, from each rank's affine map (docs/math.md, 3).

Rank r of P holds the map `S -> transition_r(S) + update_r` of its segment. It gets `state_in_r`, where `state_in_0` is
the initial state and `state_in_{r+1} = transition_r(state_in_r) + update_r`. The gradient is the same scan from the
last rank to the first with transposed transitions.

A scan is PyTorch operators, `scan_open`, `scan_start` and `scan_wait`, so that it compiles, differentiates and is saved
by activation checkpointing; PyTorch may compute between them, forward and backward. They are joined by a ticket: a
float64 number, because autograd only joins operators through floating tensors. The gradient of a forward scan's ticket
is the ticket of its backward scan. Groups go by name, since operators take no process groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from seqtrain.errors import unknown_name
from seqtrain.kernels.affine import AffineMap, AffineShape, transition_gradient, transpose
from seqtrain.parallel.cost import costs_of
from seqtrain.parallel.scan_engine import Engine, Job, check_in, check_out, engine_of
from seqtrain.parallel.schedules import ALGORITHMS, SCHEDULES, Pipeline, Schedule, candidates, choose

if TYPE_CHECKING:
    Algorithm = str
else:
    Algorithm = Literal[ALGORITHMS]
# A state in bfloat16 loses up to 6% over 256 ranks: no narrower type travels.
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def all_scan(
    transition: Tensor | None,
    update: Tensor,
    *,
    group: dist.ProcessGroup,
    initial_state: Tensor | None = None,
    algorithm: Algorithm = "auto",
    blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The state that enters this rank's segment and the state that leaves it: `(state_in, final_state)`.

    Args:
        transition: None (identity), `[B,H]` or `[B,H,K]` (broadcast over the trailing dimensions), dense `[B,H,K,K]`;
            `[B,D]` for a state `[B,D]`. The same form on every rank: a rank without tokens passes the identity in that
            form.
        update: `[B,H,K,V]`, or `[B,D]`; float32, float64, complex64 or complex128, as is the transition.
        group: the ranks that hold the sequence, in order. Every rank of it calls, in the same order of scans.
        initial_state: like `update`, the state before the first token. It counts on the group's first rank; on others
            it is ignored and its gradient is zero.
        algorithm: `"pipeline"` (blocks along a chain), `"tree"` (log depth), `"all_gather"` (everyone gets every map),
            `"ring"` (a chain of whole states that blocks the caller), or `"auto"`: the cheapest by measured costs.
        blocks: into how many blocks the pipeline cuts a state; None lets the measured costs decide.

    Returns:
        `state_in` and `final_state`, like `update`. `final_state` is the state after this rank's segment, so the last
        rank's is the whole sequence's; nothing is sent for it. Both are differentiable, each on any rank.

    On every rank gradients must be asked for, or on none, and the loss of every rank must depend on one of its results:
    backward is a scan too. When a program ends, end with a collective or `flush_scans`: messages may be under way.
    Raises `ValueError` for shapes or dtypes that don't fit, `RuntimeError` when another rank has failed.
    """
    # Before the scan is opened: another rank may wait for what was announced.
    _check(transition, update, initial_state)
    form = None if transition is None else transition.shape
    scan = open_all_scan(
        form, update.shape, dtype=update.dtype, device=update.device, group=group, algorithm=algorithm, blocks=blocks
    )
    return scan.start(transition, update, initial_state=initial_state).wait()


def open_all_scan(
    transition_shape: Sequence[int] | None,
    update_shape: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
    algorithm: Algorithm = "auto",
    blocks: int | None = None,
    resets: Sequence[int] = (),
) -> "Scan":
    """Announces a scan before its map is computed, so that no message has to wait for this rank to be ready.

    `start` the result with this rank's map. `resets`: the ranks whose segments forget the state that enters them, the
    same on every rank: their transitions are not read.
    """
    if algorithm not in ("auto", *SCHEDULES):
        raise ValueError("all_scan: " + unknown_name("algorithm", algorithm, ("auto", *SCHEDULES)))
    if blocks is not None and (algorithm != "pipeline" or blocks < 1):
        raise ValueError(
            f"all_scan: blocks={blocks} with algorithm={algorithm!r}; give 1 or more, with 'pipeline' only"
        )
    _check_shape(transition_shape, update_shape, dtype)
    where = (group.group_name, algorithm if blocks is None else f"{algorithm} {blocks}", list(resets))
    ticket = torch.ops.seqtrain.scan_open(transition_shape, update_shape, dtype, device, *where)
    return Scan(ticket, transition_shape, update_shape, where)


@dataclass
class Scan:
    """A scan whose receives are posted; `start` it, then `wait`, each once."""

    ticket: Tensor
    transition_shape: Sequence[int] | None
    update_shape: Sequence[int]
    # The group's name; the algorithm, with the number of blocks where it was given, as in "pipeline 4"; the resets.
    where: tuple[str, str, list[int]]
    inputs: tuple[Tensor | None, Tensor] | None = None

    def start(self, transition: Tensor | None, update: Tensor, *, initial_state: Tensor | None = None) -> "Scan":
        """Lets the scan run; the tensors as for `all_scan`, of the shapes it was opened with."""
        _check(transition, update, initial_state)
        came = (None if transition is None else tuple(transition.shape), tuple(update.shape))
        opened = (None if self.transition_shape is None else tuple(self.transition_shape), tuple(self.update_shape))
        if came != opened:
            raise ValueError(f"all_scan: transition and update have shapes {came}, the scan was opened for {opened}")
        self.ticket = torch.ops.seqtrain.scan_start(self.ticket, transition, update, initial_state)
        self.inputs = (transition, update)
        return self

    def wait(self) -> tuple[Tensor, Tensor]:
        """`(state_in, final_state)`."""
        assert self.inputs is not None, "a scan is started before it is waited for"
        return torch.ops.seqtrain.scan_wait(self.ticket, *self.inputs, *self.where)


def flush_scans(group: dist.ProcessGroup) -> None:
    """Waits until all that this rank's scans had to send has left it. Call it before destroying the group."""
    engine_of(group.group_name).flush()


def scans_opened(group: dist.ProcessGroup) -> int:
    """How many scans this rank has taken part in, forward and backward ones; measurements are not counted."""
    return engine_of(group.group_name).scans


def plan_scan(engine: Engine, shape: AffineShape, dtype: torch.dtype, device: torch.device, algorithm: str) -> Schedule:
    """The plan for a scan of this shape; measures the group the first time a choice has to be made."""
    if engine.size == 1:
        return Pipeline()
    plans = candidates(algorithm)
    if len(plans) == 1:
        return plans[0]
    costs = engine.costs or costs_of(engine, device)
    return choose(costs, shape, engine.size, dtype.itemsize, algorithm)


def _check(transition: Tensor | None, update: Tensor, initial_state: Tensor | None) -> None:
    _check_shape(None if transition is None else transition.shape, update.shape, update.dtype)
    for name, tensor in (("transition", transition), ("initial_state", initial_state)):
        if tensor is not None and (tensor.dtype, tensor.device) != (update.dtype, update.device):
            came, expected = f"{tensor.dtype} on {tensor.device}", f"{update.dtype} on {update.device}"
            raise ValueError(f"all_scan: {name} is {came}, expected {expected}, as update is")
    if initial_state is not None and initial_state.shape != update.shape:
        shapes = f"{tuple(initial_state.shape)}, expected {tuple(update.shape)}, update's"
        raise ValueError(f"all_scan: initial_state has shape {shapes}")


def _check_shape(transition: Sequence[int] | None, update: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"all_scan: update is {dtype}, expected one of {DTYPES}; states travel in float32: use .float()"
        )
    try:
        AffineShape.of(update, transition)
    except ValueError as complaint:
        raise ValueError(f"all_scan: {complaint}") from None


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        return d_out, *(torch.zeros_like(other) for other in ctx.saved_tensors)


def keep_in_graph(out: Tensor, *others: Tensor) -> Tensor:
    """`out`, on which `others` have no influence but whose gradients go through them.

    A message comes back in the backward pass only where the loss depends on the one that was sent.
    """
    return _KeepInGraph.apply(out, *others)


@torch.library.custom_op("seqtrain::scan_open", mutates_args=())
def _scan_open(
    transition_shape: Sequence[int] | None,
    update_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group_name: str,
    algorithm: str,
    resets: Sequence[int],
) -> Tensor:
    shape = AffineShape.of(update_shape, transition_shape)
    return _ticket(_open(shape, dtype, device, group_name, algorithm, resets))


@torch.library.custom_op("seqtrain::scan_start", mutates_args=())
def _scan_start(opened: Tensor, transition: Tensor | None, update: Tensor, initial_state: Tensor | None) -> Tensor:
    job = check_out(int(opened.item()))
    own = AffineMap(job.shape.transition(transition), job.shape.state(update), job.forgets)
    return _start(job, own, None if initial_state is None else job.shape.state(initial_state))


@torch.library.custom_op("seqtrain::scan_wait", mutates_args=())
def _scan_wait(
    ticket: Tensor,
    transition: Tensor | None,
    update: Tensor,
    group_name: str,
    algorithm: str,
    resets: Sequence[int],
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
    resets: Sequence[int],
) -> Tensor:
    """Starts the scan of gradients. With `D` and `F` the gradients of `state_in` and `final_state` from inside this
    rank, the gradient `G` that comes from the next rank continues as `transition^T(G + F) + D`: an affine map again.
    """
    shape = AffineShape.of(state_gradient.shape, None if transition is None else transition.shape)
    where = (group_name, algorithm, resets)
    job = _open(shape, state_gradient.dtype, state_gradient.device, *where, reverse=True)
    own = AffineMap(transpose(shape.transition(transition)), shape.state(state_gradient), job.forgets)
    if final_gradient is not None:
        own = replace(own, update=own.apply(shape.state(final_gradient)))
    job.forward = (state_in, final_gradient)
    return _start(job, own, None)


@torch.library.custom_op("seqtrain::scan_wait_backward", mutates_args=())
def _scan_wait_backward(
    ticket: Tensor,
    transition_shape: Sequence[int] | None,
    update_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of update, transition (empty where there is none) and initial state."""
    job = check_out(int(ticket.item()))
    assert job.forward is not None, "a scan of gradients knows the states of its forward scan"
    state_in, final_gradient = job.forward
    arrived, leaving = (state.view(update_shape) for state in job.result())
    d_update = arrived.clone() if final_gradient is None else arrived + final_gradient
    if transition_shape is None:
        d_transition = d_update.new_empty(0)
    else:
        d_transition = transition_gradient(job.shape.state(d_update), job.shape.state(state_in)).view(transition_shape)
    # The scan of gradients ends at the group's first rank, the only one whose initial state was read.
    d_initial = leaving if job.wire.rank(job.wire.place) == 0 else torch.zeros_like(leaving)
    return d_update, d_transition, d_initial


def _open(
    shape: AffineShape,
    dtype: torch.dtype,
    device: torch.device,
    group_name: str,
    algorithm: str,
    resets: Sequence[int],
    *,
    reverse: bool = False,
) -> Job:
    engine = engine_of(group_name)
    plan = plan_scan(engine, shape, dtype, device, algorithm)
    engine.scans += 1
    return engine.open(plan, shape, dtype, device, reverse=reverse, resets=resets)


def _start(job: Job, own: AffineMap, first: Tensor | None) -> Tensor:
    job.engine.start(job, own, first)
    return _ticket(job)


def _ticket(job: Job) -> Tensor:
    return torch.tensor([check_in(job)], dtype=torch.float64)


def _fake_ticket(*unused: Any, **likewise: Any) -> Tensor:
    return torch.empty(1, dtype=torch.float64)


for operator in (_scan_open, _scan_start, _scan_start_backward):
    operator.register_fake(_fake_ticket)


@_scan_wait.register_fake
def _(ticket, transition, update, group_name, algorithm, resets):
    return update.new_empty(update.shape), update.new_empty(update.shape)


@_scan_wait_backward.register_fake
def _(ticket, transition_shape, update_shape, dtype, device):
    form = (0,) if transition_shape is None else transition_shape
    return tuple(torch.empty(tuple(x), dtype=dtype, device=device) for x in (update_shape, form, update_shape))


def _remember_start(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, transition, update, initial_state = inputs
    ctx.transition_shape = None if transition is None else transition.shape
    ctx.update_shape, ctx.dtype, ctx.device = update.shape, update.dtype, update.device
    ctx.has_initial_state = initial_state is not None


def _start_gradients(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
    d_update, d_transition, d_initial = torch.ops.seqtrain.scan_wait_backward(
        ticket, ctx.transition_shape, ctx.update_shape, ctx.dtype, ctx.device
    )
    d_transition = None if ctx.transition_shape is None else d_transition
    return None, d_transition, d_update, d_initial if ctx.has_initial_state else None


def _remember_wait(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, transition, _, *ctx.where = inputs
    ctx.save_for_backward(transition, output[0])
    ctx.set_materialize_grads(False)


def _wait_gradients(
    ctx: Any, state_gradient: Tensor | None, final_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    transition, state_in = ctx.saved_tensors
    if state_gradient is None:
        state_gradient = torch.zeros_like(state_in)
    ticket = torch.ops.seqtrain.scan_start_backward(transition, state_in, state_gradient, final_gradient, *ctx.where)
    return ticket, None, None, None, None, None


_scan_start.register_autograd(_start_gradients, setup_context=_remember_start)
_scan_wait.register_autograd(_wait_gradients, setup_context=_remember_wait)

# What must run once: activation checkpointing keeps the results. Other modules add operators of theirs.
COMMUNICATE = {
    torch.ops.seqtrain.scan_open.default,
    torch.ops.seqtrain.scan_start.default,
    torch.ops.seqtrain.scan_wait.default,
}


def save_scans(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy for selective activation checkpointing: everything is computed again, but nothing is sent again."""
    return CheckpointPolicy.MUST_SAVE if operator in COMMUNICATE else CheckpointPolicy.PREFER_RECOMPUTE


# Pass as `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=checkpoint_contexts)`.
checkpoint_contexts: Callable = partial(create_selective_checkpoint_contexts, save_scans)
