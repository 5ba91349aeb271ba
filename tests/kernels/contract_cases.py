"""Calls of every operator, made from its declaration: its tensors, its variants, and what it returns by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from seqtrain.kernels import OPERATORS, Operator
from seqtrain.testing import TOLERANCES, boundaries, decay_like, relative_error
from tests.conftest import INTERPRETED

# Triton's kernels run on a GPU where there is one, and are interpreted on the CPU where that is asked for.
GPU = torch.cuda.is_available() and not INTERPRETED

SIZES = {
    "B": 2,
    "H": 4,
    "G": 2,
    "K": 8,
    "V": 5,
    "D": 6,
    "M": 5,
    "N": 3,
    "W": 4,
    "C": 5,
    "F": 14,
    "R": 3,
    "n": 21,
    "vocab": 11,
    "d0": 3,
    "S": 2,
}
if INTERPRETED:  # a program for each head takes long
    SIZES["H"] = 2
# What an operator can't be called without, and what makes it do something else: the first is its plain call.
# "shapes": the shape of an argument that has several, or None to leave out an optional one.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "delay": [{"by": 3}, {"by": 20}],
    "delta_rule": [
        {"shapes": {"log_decay": shape, "read": None, "erase": None}} for shape in ("B T H", None, "B T H K")
    ]
    + [{"shapes": {"log_decay": "B T H K"}}],
    "diagonal_scan": [
        {"shapes": {"log_a": "B T D"}},
        {"shapes": {"log_a": "D"}, "complex": ("log_a",)},
        {"shapes": {"log_a": "B T D"}, "complex": ("x", "log_a")},
    ],
    "diagonal_system": [{}, {"form": "fft"}],
    "gated_norm": [
        {"eps": 1e-6, "shapes": {"weight": "V"}},
        {"eps": 1e-6, "shapes": {"weight": "H V", "gate": None}},
        {"eps": 1e-6, "shapes": {"weight": "V"}, "activation": "sigmoid", "gate_first": True},
    ],
    "kronecker_attention": [{}, {"degree": 4, "scale": 0.3, "sizes": {"K": 2, "R": 2}}],
    "linear_attention": [{"shapes": {"log_decay": shape}} for shape in ("B T H", None, "H", "B T H K")],
    "linear_cross_entropy": [{"chunk": 8}, {"chunk": 100}],
    "linear_swiglu": [{}],
    "short_convolution": [{}, {"activation": "silu", "dilation": 3, "shapes": {"bias": None}}],
    "sink_attention": [
        {"window": 9, "sinks": 2},
        {"window": 1, "sinks": 3},
        {"window": 40, "shapes": {"extra_score": None, "extra_value": None}},
    ],
    "sparse_mlp": [{}],
    "softmax_attention": [{}, {"window": 16}, {"window": 1, "scale": 0.3}, {"score_cap": 0.7}],
    # A small exponent: near the polynomial's least the gradient of q is a difference of what nearly cancels.
    "tensor_attention": [{"degree": 2}, {"degree": 4, "scale": 0.3, "sizes": {"K": 2}}],
}


# Of a variant: not options.
_FIELDS = ("shapes", "complex", "sizes")


@dataclass
class Case:
    """An operator, its options, and how its tensors are made."""

    operator: Operator
    options: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, str | None] = field(default_factory=dict)
    complex: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    decay: str = "wide"  # as in `decay_like`
    beta: float = 1.0  # its upper bound

    @property
    def has_state(self) -> bool:
        return self.operator.declared.state is not None

    @property
    def has_read(self) -> bool:
        """Whether it is the delta rule's diagonal plus low-rank form, which not every backend has."""
        return self.operator.name == "delta_rule" and self.shapes.get("read", "") is not None

    def tensors(self, tokens: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
        """The tensors by name, those left out too, as None."""
        generator = torch.Generator().manual_seed(seed)
        sizes = SIZES | self.sizes | {"B": batch, "T": tokens}
        made = {}
        for name, shapes in self.operator.arguments.items():
            shape = self.shapes.get(name, shapes[-1])
            kind = self.operator.kinds.get(name, "")
            is_complex = kind == "a complex dtype" or name in self.complex
            made[name] = shape and self._numbers(name, kind, is_complex, _dims(shape, sizes), generator)
        if "beta" in made:  # the delta rule is stable for short keys
            made["beta"] = self.beta * made["beta"]
            for name in ("k", "read", "erase"):
                made[name] = None if made[name] is None else torch.nn.functional.normalize(made[name], dim=-1)
            made["erase"] = None if made["erase"] is None else 0.8 * made["read"]
        return {name: cast(x, dtype) for name, x in made.items()}

    def state(self, states: int, *, dtype: torch.dtype = torch.float64, packed: bool = False) -> Any:
        """The state some tokens left, of rows or of packed documents; any other might be one that can't be."""
        lengths = [20 if not packed else (20, 3, 0, 17)[n % 4] for n in range(states)]
        batch, tokens = (1, sum(lengths)) if packed else (states, 20)
        past, learned = self.tensors(tokens, batch=batch, seed=7), self.tensors(1, batch=1)
        timed = dict(zip(past, self.operator.along_time(list(past.values())), strict=True))
        # What is learned is the same before and after.
        past = {name: x if timed[name] else learned[name] for name, x in past.items()}
        documents = {"cu_seqlens": boundaries(lengths)} if packed else {}
        _, state = self.operator(**past, **documents, **self.options, backend="reference")
        dtype = torch.float32 if dtype == torch.bfloat16 and not isinstance(state, dict) else dtype
        return {k: cast(x, dtype) for k, x in state.items()} if isinstance(state, dict) else cast(state, dtype)

    def _numbers(self, name: str, kind: str, is_complex: bool, shape: list[int], generator: torch.Generator) -> Tensor:
        if kind == "int64":
            labels = torch.randint(SIZES["vocab"], shape, generator=generator)
            labels[1::4] = -100  # count for nothing
            return labels
        normal = torch.randn(shape, generator=generator, dtype=torch.complex128 if is_complex else torch.float64)
        if name in ("log_decay", "log_a"):
            decay = decay_like(shape, self.decay, generator)
            return torch.complex(decay, normal.imag) if is_complex else decay
        return normal.sigmoid() if name in ("beta", "rate", "shares") else normal


def _dims(shape: str, sizes: dict[str, int]) -> list[int]:
    letters = shape.replace("...", "d0").split()
    return [sizes[letter[:-2]] + 1 if letter.endswith("+1") else sizes[letter] for letter in letters]


def cast(x: Any, dtype: torch.dtype) -> Any:
    """A floating or complex tensor with numbers of `dtype`; others as they are."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    if x.is_complex():
        return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return x.to(dtype)


def flat(state: Any) -> dict[str, Any]:
    """A state by name: nothing, a tensor, or a dict of them."""
    if state is None:
        return {}
    return {f"state {k}": x for k, x in state.items()} if isinstance(state, dict) else {"state": state}


def call(case: Case, tensors: dict[str, Any], state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """Output and state (None of an operator without one)."""
    given = {} if state is None else {"initial_state": state}
    result = case.operator(**tensors, **given, **case.options, **options)
    return result if isinstance(result, tuple) else (result, None)


def run(case: Case, tensors: dict[str, Any], state: Any = None, **options: Any) -> dict[str, Tensor]:
    """Output, state, and the gradients of a sum of both weighted with normal numbers, by name."""
    tensors = {name: _leaf(x) for name, x in tensors.items()}
    state = {k: _leaf(x) for k, x in state.items()} if isinstance(state, dict) else _leaf(state)
    out, after = call(case, tensors, state, **options)
    found = {"out": out, **flat(after)}
    ends = [(x, _weights(x)) for x in found.values() if x.requires_grad]
    given = tensors | {f"initial {name}": x for name, x in flat(state).items()}
    leaves = {name: x for name, x in given.items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(
        [x for x, _ in ends], list(leaves.values()), [weight for _, weight in ends], allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: x.detach() for name, x in found.items()}


def assert_equal(came: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative errors within `tolerance`; of what is zero but for rounding (a window of one key leaves nothing to learn
    for queries), the error itself.
    """
    assert came.keys() == expected.keys()
    errors = {
        name: relative_error(came[name], x if x.abs().sum() > 1e-12 else torch.zeros_like(x))
        for name, x in expected.items()
    }
    assert {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance} == {}


def check(
    case: Case,
    backend: str,
    tokens: int,
    dtype: torch.dtype,
    *,
    lengths: list[int] | None = None,
    past: bool = False,
    device: str = "cpu",
    limits: dict[torch.dtype, float] = TOLERANCES,
) -> None:
    """A call, of two rows or of documents of these `lengths`, against the definition in float64 on the same numbers."""
    try:
        case.operator.choose(backend, torch.device(device))
    except ValueError as reason:
        pytest.skip(str(reason))
    batch = 2 if lengths is None else 1
    tensors = {name: cast(x, dtype) for name, x in case.tensors(tokens, batch=batch).items()}
    if case.operator.name == "gated_norm":  # its weight is float32 at least
        tensors["weight"] = tensors["weight"].to(torch.promote_types(dtype, torch.float32))
    state = case.state(len(lengths or [0] * batch), dtype=dtype, packed=lengths is not None) if past else None
    options = {} if lengths is None else {"cu_seqlens": boundaries(lengths)}

    def results(backend: str, change: Callable[[Any], Any]) -> dict[str, Tensor]:
        past = {key: change(x) for key, x in state.items()} if isinstance(state, dict) else change(state)
        return run(case, {name: change(x) for name, x in tensors.items()}, past, backend=backend, **options)

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    assert_equal(results(backend, moved), results("reference", lambda x: cast(moved(x), torch.float64)), limits[dtype])


def _leaf(x: Any) -> Any:
    differentiable = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return x.detach().clone().requires_grad_() if differentiable else x


def _weights(x: Tensor) -> Tensor:
    """Normal numbers that every dtype holds exactly, so that two dtypes have one loss."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(x)


CASES = {
    f"{name}{index or ''}": Case(
        OPERATORS[name],
        {k: v for k, v in each.items() if k not in _FIELDS},
        **{k: v for k, v in each.items() if k in _FIELDS},
    )
    for name in sorted(OPERATORS)
    for index, each in enumerate(VARIANTS.get(name, [{}]))
}
