"""Operators for torch.compile: what it must not look into becomes one node of its graph, with gradients.

`differentiable` is for kernels: two plain functions, forward and backward, and one that tells shapes. `opaque` is for
PyTorch code that can't be traced, or is better not: loops over chunks, boundaries of documents read on the host. Both
leave calls outside of torch.compile as fast as they were: an operator of `torch.library` costs 50 microseconds more,
forward and backward, than the `autograd.Function` that stands in for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAMESPACE = "seqtrain"

# `forward(*arguments)`, `shapes(*arguments)`: the results, then what the backward pass is given of the forward pass.
Forward = Callable[..., tuple[Tensor, ...]]
# `backward(arguments, kept, gradients)`: gradients of the arguments, None for those that have none.
Backward = Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor | None]]
F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class Operator:
    """A differentiable function in two forms: as `torch.ops.seqtrain.<name>`, and as an `autograd.Function`."""

    op: Any
    function: type[torch.autograd.Function]
    forward: Forward
    results: int

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The first `results` tensors of `forward(*arguments)`, differentiable."""
        # Kernels read memory, which fake tensors (`seqtrain.planning.trace`) do not have; the operator knows shapes.
        if torch.compiler.is_compiling() or any(isinstance(x, FakeTensor) for x in arguments):
            return _tuple(self.op(*arguments))[: self.results]
        # An `autograd.Function` takes 50 microseconds even where nothing is recorded, which decoding would notice.
        return self.function.apply(*arguments) if torch.is_grad_enabled() else self.forward(*arguments)[: self.results]


def differentiable(
    name: str,
    forward: Forward,
    backward: Backward,
    shapes: Forward,
    *,
    results: int,
    keep_results: bool = False,
    schema: str = "",
) -> Operator:
    """The operator `seqtrain::<name>`.

    forward: annotated with `Tensor`, `Tensor | None`, `int`, `float`, `bool` or `str`, and a tuple of so many tensors,
        or described by a `schema` of PyTorch's. Its arguments are positional; no tensor it returns may be a view of an
        argument or of another one. The first `results` are the caller's, the others are kept for `backward`.
    backward: is given the arguments, what was kept, and a gradient of each result (zeros where it had none); returns
        one for each argument. They are taken as contiguous and of the argument's shape and dtype.
    keep_results: what is kept for `backward` begins with the results.
    shapes: like `forward`, with `torch.empty` tensors of the same shapes, dtypes and strides.
    """
    schema = schema or torch.library.infer_schema(forward, mutates_args=())
    arguments, returned = schema[1:].split(") -> ")
    # A tuple of one is no type of an operator's result.
    single = returned == "((Tensor))"
    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        _first_of(forward) if single else forward,
        mutates_args=(),
        schema=f"({arguments}) -> {'Tensor' if single else returned}",
    )
    op.register_fake(_first_of(shapes) if single else shapes)
    backward_op = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        _listed(backward, arguments.count(",") + 1),
        mutates_args=(),
        schema=f"({arguments}, Tensor[] kept, Tensor[] gradients) -> Tensor[]",
    )
    backward_op.register_fake(_empty_gradients)

    def gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, kept, d_results = _recall(ctx, given[:results])
        found = iter(backward_op(*inputs, list(kept), list(d_results)))
        return tuple(next(found) if _has_gradient(x) else None for x in inputs)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        _remember(ctx, inputs, _tuple(output), results, keep_results)

    op.register_autograd(gradients, setup_context=remember)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            _remember(ctx, inputs, output, results, keep_results)
            return output[:results]

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(backward(*_recall(ctx, given)))

    return Operator(op, Eager, forward, results)


def constant(function: F) -> F:
    """Decorates a function whose answer torch.compile takes as it finds it, without tracing how it is come by.

    This is all that `torch.compiler.assume_constant_result` does, but that imports the compiler, which takes a second,
    and Triton with it where it is installed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque(name: str, *, like: Callable[..., tuple[Tensor, ...]]) -> Callable[[F], F]:
    """Decorates a differentiable function of tensors: torch.compile takes it for the operator `seqtrain::<name>`.

    like: given the same arguments, tensors that have the results' shapes and dtypes. The function is annotated as
    `forward` of `differentiable`; its backward pass, compiled, computes it again. Elsewhere it is called as it is.
    """

    def decorate(function: F) -> F:
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            with torch.no_grad(), _without_autocast(arguments):
                return _separate(function(*arguments), arguments)

        forward.__signature__ = signature(function)  # type: ignore[attr-defined]

        def backward(
            arguments: tuple[Any, ...], _: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
        ) -> list[Tensor | None]:
            arguments = tuple(x.detach().requires_grad_() if _has_gradient(x) else x for x in arguments)
            leaves = [x for x in arguments if _has_gradient(x)]
            with _autograd_of(leaves[0]), torch.enable_grad(), _without_autocast(arguments):
                found = iter(torch.autograd.grad(function(*arguments), leaves, gradients, materialize_grads=True))
            return [next(found) if _has_gradient(x) else None for x in arguments]

        def shapes(*arguments: Any) -> tuple[Tensor, ...]:
            return tuple(_empty_like(x) for x in like(*arguments))

        results = len(signature(function).return_annotation.__args__)
        operator = differentiable(name, forward, backward, shapes, results=results)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        call.operator = operator  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _first_of(function: Forward) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments)[0]


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)


def _listed(backward: Backward, count: int) -> Callable[..., list[Tensor]]:
    """`backward` with the arguments one by one, its results as an operator returns them."""

    def call(*arguments: Any) -> list[Tensor]:
        inputs, (kept, gradients) = arguments[:count], arguments[count:]
        found = backward(inputs, tuple(kept), tuple(gradients))
        pairs = [(x, d_x) for x, d_x in zip(inputs, found, strict=True) if _has_gradient(x)]
        own = _separate([torch.zeros_like(x) if d_x is None else d_x for x, d_x in pairs], arguments)
        return [d_x.contiguous() for d_x in own]

    return call


def _empty_gradients(*arguments: Any) -> list[Tensor]:
    return [_empty_like(x) for x in arguments[:-2] if _has_gradient(x)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], results: int, keep_results: bool) -> None:
    kept = output if keep_results else output[results:]
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *kept)
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
    ctx.results = [(x.shape, x.dtype, x.device) for x in output[:results]]
    ctx.set_materialize_grads(False)


def _recall(
    ctx: Any, given: tuple[Tensor | None, ...]
) -> tuple[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The arguments, what was kept, and the gradients of all results."""
    # Read once: activation checkpointing recomputes them on the first read and refuses a second.
    saved = iter(ctx.saved_tensors)
    inputs = tuple(next(saved) if other is None else other[0] for other in ctx.others)
    gradients = (
        torch.zeros(shape, dtype=dtype, device=device) if d_x is None else d_x
        for d_x, (shape, dtype, device) in zip(given, ctx.results, strict=True)
    )
    return inputs, tuple(saved), tuple(gradients)


def _separate(results: Sequence[Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """`results`, contiguous; copies of those that share memory with an argument or an earlier one: none may."""
    flat = [x for each in arguments for x in (each if isinstance(each, list) else [each])]
    taken = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, Tensor)}
    own = []
    for x in results:
        shared = x.untyped_storage().data_ptr() in taken
        own.append(x.clone(memory_format=torch.contiguous_format) if shared else x.contiguous())
        taken.add(own[-1].untyped_storage().data_ptr())
    return tuple(own)


def _autograd_of(x: Tensor) -> Any:
    """A context in which autograd records what happens to tensors like `x`: inside an operator it is switched off."""
    off = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off - torch._C._dispatch_keys(x))


def _without_autocast(arguments: tuple[Any, ...]) -> torch.autocast:
    device = next(x.device.type for x in arguments if isinstance(x, Tensor))
    return torch.autocast(device, enabled=False)
