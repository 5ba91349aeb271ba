"""What a profiler looks at in an engine: the calls that a step goes through, and the tensors it holds."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from seqtrain.runtime.engine import Engine

# An object or module, and the name of its function.
Place = tuple[Any, str]
PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS = "parameters", "gradients", "optimizer", "buffers"


def step_calls(engine: Engine) -> list[tuple[Place, Literal["optimizer", "gradients", "autograd"]]]:
    """The functions in which a step works outside the model, and what each does; they nest."""
    inner = engine.deepspeed
    calls: list[tuple[Place, Literal["optimizer", "gradients", "autograd"]]] = [
        ((inner, "step"), "optimizer"),
        ((inner, "backward"), "gradients"),
        ((torch.autograd, "backward"), "autograd"),
    ]
    # Called by the hooks of ZeRO 1 and 2 in the middle of the backward pass.
    if "reduce_ready_partitions_and_remove_grads" in dir(inner.optimizer):
        calls.append(((inner.optimizer, "reduce_ready_partitions_and_remove_grads"), "gradients"))
    return calls


def kept_collectives() -> list[Place]:
    """Those of torch's collectives that DeepSpeed's backend keeps under names of its own."""
    from deepspeed.comm import comm

    return [(comm.cdb, "all_gather_function"), (comm.cdb, "reduce_scatter_function")]


def held_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """The tensors of model and optimizer by kind: PARAMETERS to BUFFERS; some share storage, or occur twice.

    ZeRO's flat copies of the weights in float32 are the optimizer's; what else it keeps is a gradient where it is
    called one, else a buffer.
    """
    model, zero = engine.module, engine.deepspeed.optimizer
    inner = zero if isinstance(zero, torch.optim.Optimizer) else zero.optimizer
    weights = list(model.parameters())
    own = vars(zero) if inner is not zero else {}
    return {
        # In stage 3 a weight's values lie in its partition.
        PARAMETERS: [*weights, *(vars(weight)["ds_tensor"] for weight in weights if "ds_tensor" in vars(weight))],
        GRADIENTS: [
            *(weight.grad for weight in weights if weight.grad is not None),
            *_tensors_in([value for name, value in own.items() if "grad" in name]),
        ],
        OPTIMIZER: [
            *_tensors_in([dict(state) for state in inner.state.values()]),
            *_tensors_in([group["params"] for group in inner.param_groups]),
        ],
        BUFFERS: [*model.buffers(), *_tensors_in(list(own.values()))],
    }


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Tensors in `value` and in the lists, tuples and dicts inside it, `depth` deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, depth - 1)
