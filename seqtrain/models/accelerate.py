"""Our operators under transformers' own modules: `accelerate_hf(model)`.

transformers' recurrent layers call functions of their modelling file. A module that does gets a `forward` of its own:
the same code, with ours in the place of those functions. Neither the file nor any other model is touched.
"""

import inspect
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.models.accelerate_functions import FUNCTIONS, FUSED, KEPT, MASKS, METHODS, PACKED, positions
from seqtrain.models.huggingface_packing import packing_of

# The mark of a module that has something of ours.
ACCELERATED = "seqtrain_accelerated"


class Acceleration:
    """What `accelerate_hf` did to a model; a context manager that undoes it in the end.

    `replaced`: by a module's name, the functions and methods that are ours now. `kept`: by a recurrent module's name,
    why it stays as it was.
    """

    def __init__(self, model: nn.Module):
        self.replaced: dict[str, tuple[str, ...]] = {}
        self.kept: dict[str, str] = {}
        self._title = type(model).__name__
        self._methods: list[tuple[nn.Module, str]] = []
        self._hooks: list[Any] = []

    def undo(self) -> None:
        """Leaves the model as it was."""
        for module, name in self._methods:
            delattr(module, name)
            module.__dict__.pop(ACCELERATED, None)
        for hook in self._hooks:
            hook.remove()
        self._methods, self._hooks = [], []

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{name}: seqtrain's {', '.join(functions)}" for name, functions in self.replaced.items()]
        lines += [f"{name}: as it was, {why}" for name, why in self.kept.items()]
        return "\n".join(lines or [f"{self._title}: no layer that seqtrain has an operator for"])

    def _method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        setattr(module, ACCELERATED, True)
        # A bound method, which `copy.deepcopy` binds to the copy.
        setattr(module, name, MethodType(function, module))
        self._methods.append((module, name))


def accelerate_hf(model: nn.Module) -> Acceleration:
    """Puts seqtrain's operators under the recurrent layers of `model`, a transformers model or a module around one.

    Takes the place of the gated delta rule, Kimi Delta Attention, Mamba's and Mamba-2's scans, RG-LRU's, lightning
    attention and short convolutions in the modules of this model alone, whatever its family. Rows packed by
    `cu_seq_lens_q`, `seq_idx` or `position_ids` start each document with an empty state and convolution; where only
    the first two are given, positions follow from them, and no cache is made. Single steps of a convolution or
    Mamba's scan stay transformers' own.

    Returns what was done, with `.undo()`: `with accelerate_hf(model) as done: ...`. Raises `ValueError` for a model
    that is accelerated already.
    """
    done = Acceleration(model)
    modules = dict(model.named_modules())
    if any(hasattr(module, ACCELERATED) for module in modules.values()):
        raise ValueError(f"accelerate_hf: {type(model).__name__} is accelerated already; undo that first")
    around: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if functions := _replace(done, name, module):
            done.replaced[name or type(module).__name__] = functions
            around |= {parent: modules[parent] for parent in _parents(name)}
    for module in around.values():
        if masks := MASKS.get(type(module).__name__):
            done._method(module, "forward", _with_globals(type(module).forward, masks))
        if _is_a(module, "PreTrainedModel"):
            done._hooks += _hooks(module, _enter_model)
        elif _is_a(module, "GradientCheckpointingLayer"):
            done._hooks += _hooks(module, _enter_layer)
    return done


def _is_a(module: nn.Module, name: str) -> bool:
    return any(each.__name__ == name for each in type(module).__mro__)


def _parents(name: str) -> Iterator[str]:
    """'' and 'a' of 'a.b'; the module itself, too, which may be the model."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _replace(done: Acceleration, name: str, module: nn.Module) -> tuple[str, ...]:
    """The functions and methods of `module` that are ours now; `done.kept` says what stays."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return ()
    if why := KEPT.get(kind.__name__):
        done.kept[name] = why
        return ()
    methods = METHODS.get(kind.__name__, {})
    original = _globals(kind.forward)
    functions = {key: each for key, each in FUNCTIONS.items() if key in original}
    if not methods and not functions:
        return ()
    if "forward" in module.__dict__:
        done.kept[name] = "another program has replaced its forward"
        return ()
    for key, each in functions.items():
        if _names(each) != _names(original[key]):
            done.kept[name] = f"this transformers has another signature of {key}"
            return ()
    for path, each in methods.items():
        part, _, method = path.rpartition(".")
        done._method(module.get_submodule(part), method, each)
    if functions:
        done._method(module, "forward", _with_globals(kind.forward, functions | FUSED))
    return (*functions, *methods)


def _globals(function: Callable[..., Any]) -> dict[str, Any]:
    """The functions that `function`, or what it wraps, names, by their names."""
    function = inspect.unwrap(function)
    return {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}


def _names(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "kwargs"]


def _with_globals(function: Any, names: dict[str, Any]) -> FunctionType:
    """A copy of `function`, and of what it wraps, that finds `names` where it would find its file's."""
    cells = tuple(
        CellType(_with_globals(cell.cell_contents, names)) if isinstance(cell.cell_contents, FunctionType) else cell
        for cell in function.__closure__ or ()
    )
    copy = FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _hooks(module: nn.Module, enter: Callable[..., Any]) -> list[Any]:
    """Calls `enter` before `module`, which says what is packed within it."""
    tokens = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        packed, kwargs = enter(module, args, kwargs)
        tokens.append(PACKED.set(packed))
        return args, kwargs

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if tokens:  # none where `enter` raised
            PACKED.reset(tokens.pop())

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]


def _enter_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, dict]:
    """The boundaries that a call says, and its keyword arguments, which let attention keep them."""
    if (packed := PACKED.get()) is not None:
        return packed, kwargs
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    packed = _boundaries(given)
    if packed is None:
        return None, kwargs
    if given.get("past_key_values") is not None or given.get("cache_params") is not None:
        raise ValueError("accelerate_hf: packed rows can't continue a cache; call the model without one")
    kwargs = kwargs | {"use_cache": False}
    if given.get("position_ids") is None and "position_ids" in inspect.signature(module.forward).parameters:
        kwargs["position_ids"] = positions(packed, _shape(given))
    return packed, kwargs


def _shape(given: dict[str, Any]) -> torch.Size:
    """B, T of a call."""
    tokens = given.get("input_ids")
    return (given["inputs_embeds"] if tokens is None else tokens).shape[:2]


def _boundaries(given: dict[str, Any]) -> Tensor | None:
    """`[N+1]`, or None where no row holds two documents; beside padding, positions are padding's."""
    boundaries, numbers = given.get("cu_seq_lens_q"), given.get("seq_idx")
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # Qwen3.5's: of text, then of time, height and width
    whole = mask is None or (mask.dim() == 2 and bool(mask.all()))
    if numbers is None and boundaries is None and whole and isinstance(positions, Tensor) and positions.dim() == 2:
        numbers = nn.functional.pad((positions.diff() != 1).cumsum(1), (1, 0))
    if numbers is None and boundaries is None:
        return None
    shape = _shape(given)
    known: Any = numbers if boundaries is None else boundaries
    x = torch.empty(shape, device=known.device)
    packing = packing_of(x, attention_mask=None, position_ids=None, cu_seq_lens=boundaries, seq_idx=numbers, seen=0)
    return packing.boundaries if packing is not None and len(packing.boundaries) > shape[0] + 1 else None


def _enter_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, dict]:
    """Within the model, what it says; a layer computed again in the backward pass would not know."""
    packed = PACKED.get()
    if packed is not None and getattr(layer, "gradient_checkpointing", False) and layer.training:
        raise ValueError(
            "accelerate_hf: packed rows can't be trained with gradient checkpointing; switch one of them off"
        )
    return packed, kwargs
