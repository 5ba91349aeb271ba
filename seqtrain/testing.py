"""How operators are held to their definition: error norms, one table of tolerances, a float64 oracle, hard inputs.

Usable by anyone who adds a backend or an operator:

    errors = compare_with_oracle(linear_attention, tensors, backend="chunked", dtype=torch.float32)
    assert_within(errors, torch.float32)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Largest relative Frobenius error against the float64 definition, for outputs, states and every gradient alike.
# Widening a row, or adding one for a single tensor, needs its reason on the row.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-11,  # the algebra itself: rounding of sums over some hundred terms
    torch.float32: 2e-5,  # the project's promise for odd T, packed documents, decays to -40 a token, beta to 2
    torch.float16: 2e-3,  # rounded to 11 bits
    torch.bfloat16: 1e-2,  # inputs, outputs and gradients rounded to 8 bits (4e-3 each); sums are float32
}


def relative_error(came: Tensor, expected: Tensor) -> float:
    """`|came - expected| / |expected|` in Frobenius norms, computed in float64; inf where `came` is not finite.

    Where `expected` is zero (or below 1e-30, which float32 can't hold beside its rounding) it is `|came|`.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    came, expected = came.detach().to(wide), expected.detach().to(wide)
    if came.shape != expected.shape:
        raise AssertionError(f"shape {tuple(came.shape)}, expected {tuple(expected.shape)}")
    if not torch.isfinite(came).all():
        return float("inf")
    norm = expected.norm().item()
    return (came - expected).norm().item() / (norm if norm > 1e-30 else 1.0)


def run_with_gradients(
    operator: Callable[..., tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor | None],
    weights: Sequence[Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Calls `operator(**tensors, **options)` and returns `out`, `final_state` and `grad <name>` of every tensor.

    The gradient is that of `sum(out * weights[0]) + sum(final_state * weights[1])`; the weights are normal numbers of
    a fixed seed where None. Integer tensors and None take no gradient.
    """
    leaves = {
        name: x.detach().clone().requires_grad_() if x is not None and (x.is_floating_point() or x.is_complex()) else x
        for name, x in tensors.items()
    }
    out, state = operator(**leaves, **options)
    results = {"out": out, "final_state": state}
    if weights is None:
        weights = _normal_like((out, state))
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    outputs = [(x, w.to(x.dtype)) for x, w in zip((out, state), weights, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in outputs], list(wanted.values()), [w for _, w in outputs], allow_unused=True
    )
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def compare_with_oracle(
    operator: Callable[..., tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor | None],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "chunked",
    **options: Any,
) -> dict[str, float]:
    """Relative errors of `backend` on inputs rounded to `dtype`, against `reference` on the same numbers in float64.

    `initial_state` among `tensors` is rounded to the dtype of states only. Keys as in `run_with_gradients`.
    """
    rounded = {name: x if x is None else _to_precision(x, dtype, name) for name, x in tensors.items()}
    exact = {name: x if x is None else _to_precision(x, torch.float64, name) for name, x in rounded.items()}
    came = run_with_gradients(operator, rounded, backend=backend, **options)
    # Rounded to the dtypes of what came, so that both sides have the same loss.
    weights = _normal_like((came["out"], came["final_state"]))
    expected = run_with_gradients(operator, exact, weights, backend="reference", **options)
    return {name: relative_error(came[name], expected[name]) for name in expected}


def assert_within(errors: Mapping[str, float], dtype: torch.dtype) -> None:
    """Raises `AssertionError` naming every entry of `errors` above the table's tolerance for `dtype`."""
    limit = TOLERANCES[dtype]
    beyond = {name: f"{error:.2e}" for name, error in errors.items() if not error <= limit}
    assert not beyond, f"above {limit:.0e}: {beyond}; all: { {name: f'{error:.1e}' for name, error in errors.items()} }"


def _normal_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.complex128 if x.is_complex() else torch.float64).to(x)
        for x in tensors
    ]


def _to_precision(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        return x
    if name == "initial_state" and dtype == torch.bfloat16:
        dtype = torch.float32
    if x.is_complex():
        return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return x.to(dtype)


def boundaries(lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens` (int32 `[N+1]`) of documents of these lengths; lengths may be 0."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def decay_like(shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    """Log decays of a `kind`, float64: what gates do, and what breaks kernels.

    "mild" (-0.1 or so), "wide" (from -1e-3 to -5), "strong" (-40 every token), "spikes" (mild with a tenth at -80),
    "zero" (no decay at all), "huge" (mild with a tenth between -1e4 and -3e38, about the largest number of float32).
    """
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "wide":
        return -torch.exp(8.5 * uniform - 6.9)
    if kind == "spikes":
        return torch.where(uniform < 0.1, -80.0, -0.1 * uniform)
    if kind == "huge":
        return torch.where(uniform < 0.1, -(10 ** (4 + 345 * uniform)), -0.1 * uniform)
    return uniform * {"mild": -0.2, "zero": 0.0}[kind] if kind != "strong" else torch.full_like(uniform, -40.0)


# The shapes `log_decay` may have, by the letters of DESIGN.md 4.1.
DECAY_SHAPES = ("none", "H", "BTH", "BTHK")


def recurrence_inputs(
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 2,
    key_width: int = 8,
    value_width: int = 5,
    states: int | None = None,
    decay_shape: str = "BTH",
    decay: str = "mild",
    beta: float | None = None,
    correlation: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Float64 arguments of `linear_attention`, or with `beta` (its upper bound) of `delta_rule`, by name.

    `states`: how many initial states, `batch` where None. `decay_shape`: one of `DECAY_SHAPES`; `decay` as in
    `decay_like`. `correlation`: length of a direction that all of a head's keys share, before the delta rule's keys are
    normalised.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = {"B": batch, "T": tokens, "H": heads, "K": key_width}
    k = normal(batch, tokens, heads, key_width) + correlation * normal(1, 1, heads, key_width)
    tensors: dict[str, Tensor | None] = {
        "q": normal(batch, tokens, heads, key_width),
        "k": k if beta is None else torch.nn.functional.normalize(k, dim=-1),
        "v": normal(batch, tokens, heads, value_width),
    }
    if beta is not None:
        tensors["beta"] = beta * torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64)
    shape = None if decay_shape == "none" else [sizes[letter] for letter in decay_shape]
    tensors["log_decay"] = None if shape is None else decay_like(shape, decay, generator)
    tensors["initial_state"] = normal(batch if states is None else states, heads, key_width, value_width)
    return tensors
