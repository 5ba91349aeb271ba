"""Kernels of other packages as backends of our operators, for GPUs: when one is taken.

Such a backend is a module `seqtrain.kernels.<operator>.<name>`, name one of `NAMES`, with

    run           as every backend has it
    unavailable   why the package can't be used here; None where it can
    serves        of the arguments of `run`: whether the package has this case
    trials        `(device)` -> arguments of `run`, of small cases

"auto" takes it before our own kernels, where the package is installed and agrees with `chunked` on the trials: its
results and their gradients. That is asked at first use, in each process. What it does not serve goes to the backend
that would have been taken without it.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from seqtrain.kernels.documents import boundaries_of

# Device types that these kernels run on.
DEVICES = {"cuda"}
NAMES = ("flash_qla", "attn_gym", "fla", "causal_conv1d", "liger")
# Of a result or a gradient, relative to the chunked form's, which sums in float32: kernels for 16 bits err by up to
# 1e-2 in gradients of decays.
LIMIT = 3e-2
HALVES = (torch.bfloat16, torch.float16)


def missing(package: str, distribution: str, *, capabilities: Sequence[int] = ()) -> str | None:
    """Why a package can't be used here, None where it can. capabilities: the CUDA majors that it is for, if not all."""
    if importlib.util.find_spec(package) is None:
        return f"needs {distribution}: pip install {distribution}"
    if capabilities and torch.cuda.is_available():
        major = torch.cuda.get_device_capability()[0]
        if major not in capabilities:
            return f"has no kernels for compute capability {major}.x"
    return None


def function(module: str, name: str) -> Callable:
    """A function of another package, whose import may take many seconds."""
    found: Callable = getattr(importlib.import_module(module), name)
    return found


def serves_delta_rule(inputs: Sequence[Any], cu_seqlens: Tensor | None) -> bool:
    """What no package has: other dtypes than 16 bits, keys that are read or erased elsewhere, empty documents."""
    q, k, v, _, _, read, _ = inputs
    if read is not None or q.dtype not in HALVES or not q.dtype == k.dtype == v.dtype:
        return False
    if cu_seqlens is None:
        return q.shape[1] > 0
    # What a graph may not read.
    return not torch.compiler.is_compiling() and all(a < b for a, b in pairwise(boundaries_of(cu_seqlens)))


def delta_rule_trials(device: torch.device, decays: Sequence[int] = (3,)) -> list[tuple[Any, ...]]:
    """Arguments of the delta rule's `run`: rows and documents, with log decays of so many dimensions, 0 for none."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = []
    for decay in decays:
        for rows, ends in ((2, None), (1, (0, 70, 130))):
            wide, narrow = (rows, 130, 2, 128), (rows, 130, 2)
            q, v, k = numbers(*wide), numbers(*wide), torch.nn.functional.normalize(numbers(*wide), dim=-1)
            vectors = [x.to(device, torch.bfloat16) for x in (q, k, v)]
            beta = 2 * numbers(*narrow).sigmoid()
            log_decay = -numbers(*wide[:decay]).exp() / 4 if decay else None
            state, cu_seqlens = numbers(2, 2, 128, 128), None if ends is None else torch.tensor(ends, device=device)
            others = [None if x is None else x.to(device) for x in (beta, log_decay)]
            found.append(((*vectors, *others, None, None), state.to(device), cu_seqlens, 128**-0.5))
    return found


@cache
def disagreement(package: str, backend: str, device_type: str) -> str | None:
    """Why a backend of the operator in `package` is not to be trusted on this machine; None where it is."""
    module, chunked = (importlib.import_module(f"{package}.{name}") for name in (backend, "chunked"))
    # Whoever asks first may be in a context of his own: real tensors, in the dtypes that they have.
    with _disable_current_modes(), torch.inference_mode(False), torch.autocast(device_type, enabled=False):
        return _disagreement(module, chunked, torch.device(device_type))


def _disagreement(module: ModuleType, chunked: ModuleType, device: torch.device) -> str | None:
    for number, arguments in enumerate(module.trials(device)):
        expected = _results(chunked.run, arguments, torch.float32)
        try:
            came = _results(module.run, arguments)
        # Whatever another package's kernels, or their compiler, may raise.
        except Exception as error:
            first = str(error).strip().partition("\n")[0][:200]
            return f"failed on small case {number} ({type(error).__name__}: {first})"
        errors = {name: _error(came[name], x) for name, x in expected.items()}
        worst = max(errors, key=errors.__getitem__)
        if errors[worst] > LIMIT:
            return f"differs from chunked by {errors[worst]:.1e} in {worst} of small case {number} (at most {LIMIT})"
    return None


def _results(run: Callable, arguments: Sequence[Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Results and gradients, by name; with floating arguments of 16 bits in `dtype`, if given."""
    leaves: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(leaf, x))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.detach().to(dtype if dtype and x.dtype in HALVES else x.dtype).requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        found = run(*map(leaf, arguments))
        results = found if isinstance(found, tuple) else (found,)
        weights = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in results]
        gradients = torch.autograd.grad(results, leaves, weights)
    named = {f"result {n}": x for n, x in enumerate(results)} | {f"gradient {n}": x for n, x in enumerate(gradients)}
    return {name: x.detach() for name, x in named.items()}


def _error(came: Tensor, expected: Tensor) -> float:
    """Relative to the size of `expected`; infinite for what is not a number."""
    difference, size = (float(x.norm()) for x in (came.double() - expected.double(), expected.double()))
    error = difference / max(size, 1e-30)
    return math.inf if math.isnan(error) else error
