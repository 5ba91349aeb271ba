"""First numbers of a model: those of a parameter follow from a seed and its name alone, so that none has to hold all.

A model is built on the meta device, without memory. Each parameter is then given its own, filled, and may be cut before
the next one is.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# Fills a tensor; draws from the generator, on the tensor's device, or from torch's own.
Initializer = Callable[[Tensor, torch.Generator | None], object]
# Gives an empty tensor, of the whole shape of the parameter or buffer of that name, its numbers: of its flattened ones
# at least those in the slice, for the others will be dropped.
Fill = Callable[[str, Tensor, slice], None]
WHOLE = slice(None)


@runtime_checkable
class Initialized(Protocol):
    """A module that says how its parameters begin."""

    def initializers(self) -> dict[Tensor, Initializer]:
        """Of parameters and buffers in it, for which what torch's own modules begin with does not fit."""
        ...


def normal(std: float = 1.0) -> Initializer:
    return lambda tensor, generator: nn.init.normal_(tensor, std=std, generator=generator)


def uniform(low: float, high: float) -> Initializer:
    return lambda tensor, generator: nn.init.uniform_(tensor, low, high, generator=generator)


def constant(value: float) -> Initializer:
    return lambda tensor, _: tensor.fill_(value)


def computed(values: Callable[[], Tensor]) -> Initializer:
    """`values` are the tensor's, of its shape; asked for when it is filled."""
    return lambda tensor, _: tensor.copy_(values())


def scaled(rule: Initializer, factor: float) -> Initializer:
    """`rule`'s numbers times `factor`."""

    def fill(tensor: Tensor, generator: torch.Generator | None) -> None:
        rule(tensor, generator)
        tensor.mul_(factor)

    return fill


def step_bias(low: float = 1e-3, high: float = 1e-1) -> Initializer:
    """`softplus` of it, the step size of a zero input, is log-uniform in `[low, high]` (Mamba)."""

    def fill(bias: Tensor, generator: torch.Generator | None) -> None:
        step = nn.init.uniform_(bias, math.log(low), math.log(high), generator=generator).exp()
        # The inverse of softplus: log(exp(dt) - 1) = dt + log(1 - exp(-dt)).
        bias.copy_(step + (-torch.expm1(-step)).log())

    return fill


def decay_rate(low: float = 1.0, high: float = 16.0) -> Initializer:
    """The logarithm of numbers uniform in `[low, high]`: the `A_log` of Mamba-2."""
    return lambda rate, generator: nn.init.uniform_(rate, low, high, generator=generator).log_()


def cpu_normal(generator: torch.Generator | None, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers on the CPU, for what is computed there."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(*shape, dtype=dtype, device=device, generator=generator).cpu()


@torch.no_grad()
def initialize(module: Initialized) -> None:
    """Fills what `module` itself names, from torch's own generator: for one that is built alone, not on meta."""
    for tensor, fill in module.initializers().items():
        if not tensor.is_meta:
            fill(tensor, None)


def initializers_of(module: nn.Module, std: float) -> dict[Tensor, Initializer]:
    """Of the parameters and buffers of `module` and of all modules in it; what an outer one says goes before.

    `std`: of the normal matrices of `nn.Linear` and `nn.Embedding`, whose biases are zero.
    """
    found: dict[Tensor, Initializer] = {}
    # From the inside outwards.
    for each in reversed(list(module.modules())):
        if isinstance(each, nn.Linear | nn.Embedding):
            found[each.weight] = normal(std)
        if isinstance(each, nn.LayerNorm) and each.elementwise_affine:
            found[each.weight] = constant(1.0)
        if isinstance(each, nn.Linear | nn.LayerNorm) and each.bias is not None:
            found[each.bias] = constant(0.0)
        if isinstance(each, Initialized):
            found |= each.initializers()
    return found


def drawn(module: nn.Module, initializers: Mapping[Tensor, Initializer], seed: int) -> Fill:
    """Fills each tensor of `module` from a generator of its own, which `seed` and the tensor's name decide."""
    names = dict([*module.named_parameters(), *module.named_buffers()])
    rules = {name: initializers.get(tensor) for name, tensor in names.items()}

    def fill(name: str, whole: Tensor, own: slice) -> None:
        rule = rules[name]
        if rule is None:
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(f"{name}: {owner} does not say how it begins; name it in {owner}.initializers()")
        rule(whole, generator_of(seed, name, whole.device))

    return fill


def generator_of(seed: int, name: str, device: torch.device) -> torch.Generator:
    """The generator on `device` of the parameter called `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def materialize(
    module: nn.Module,
    fill: Fill | None,
    device: torch.device,
    *,
    own: Callable[[Tensor], slice] = lambda tensor: WHOLE,
    whole_shape: Callable[[str, torch.Size], torch.Size] = lambda name, shape: shape,
    cut: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> Iterator[tuple[str, Tensor]]:
    """Brings the parameters and buffers of `module` to `device`, one after the other, filled by `fill`.

    Gives each with its name, so that it can be divided before the next one is made: at no time is there more than one
    whole. Those on the meta device stay the objects they are. `fill` None: all have their numbers. `own`: which numbers
    of a tensor will be kept. `whole_shape`, `cut`: of a part, the shape of the whole, and what is kept of that.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        shape = whole_shape(name, tensor.shape)
        if fill is None or not (tensor.is_meta or shape != tensor.shape):
            value = tensor.data.to(device)
        else:
            value = torch.empty(shape, dtype=tensor.dtype, device=device)
        if fill is not None:
            fill(name, value, own(tensor))
            value = cut(name, value)
        if tensor.is_meta:
            _become(tensor, value)
        else:
            tensor.data = value
        del value
        yield name, tensor


def materialize_all(module: nn.Module, fill: Fill | None, device: torch.device) -> None:
    """Brings `module` to `device`, filled and whole; see `materialize`."""
    for _ in materialize(module, fill, device):
        pass


def _become(tensor: Tensor, value: Tensor) -> None:
    """Makes `tensor`, on the meta device, one that holds `value`; whoever holds it sees that."""
    new = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    # Attributes are swapped, too.
    vars(new).update(vars(tensor))
    torch.utils.swap_tensors(tensor, new)
