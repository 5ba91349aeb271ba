"""Gates that make decays, in bfloat16: stored in float32, computed in float32."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from seqtrain.audit.probe import Probe
from seqtrain.audit.subject import Finding, NotChecked, Subject

aten = torch.ops.aten
# What a gate runs through on its way to a decay.
PASSED_ON = (
    aten._to_copy, aten.neg, aten.view, aten._unsafe_view, aten.expand, aten.unsqueeze, aten.add, aten.mul, aten.exp,
    aten.softplus, aten.clamp, aten.slice, aten.select, aten.transpose, aten.permute, aten.t, aten.clone, aten.rsub,
    aten.sigmoid, aten.log_sigmoid_forward, aten.cumsum,
)  # fmt: skip
# What must not be done to it in fewer bits.
DELICATE = (aten.exp, aten.exp2, aten.softplus, aten.log_sigmoid_forward, aten.cumsum)


def gates(probe: Probe) -> Iterator[Finding]:
    """Gates keep float32 where the model is cast to bfloat16, and decays are computed in it."""
    if probe.subject.module is None:
        raise NotChecked("needs the network (module=)")
    cast = probe.subject.cast(torch.bfloat16) if probe.subject.cast else _cast(probe.subject)
    assert cast.module is not None
    found = {name: each for name, each in cast.module.named_parameters() if any(gate in name for gate in cast.gates)}
    if not found:
        raise NotChecked(f"no parameter has a name such as {', '.join(cast.gates[:2])}")
    narrow = [name for name, each in found.items() if each.dtype != torch.float32]
    if narrow:
        what = f"rounded to {str(found[narrow[0]].dtype)[6:]} by the cast, and {len(narrow) - 1} more"
        yield Finding("gates kept", narrow[0], what, "what keeps parameters in float32 when a model is cast or sharded")
    with torch.no_grad(), GateWatch(cast.module, list(found.values())) as watch:
        cast.forward(probe.rows(1, cast.tokens))
    if watch.first:
        module, function, dtype = watch.first
        what = f"{function} of a gate in {dtype}"
        yield Finding("gates computed", module, what, "a cast to float32 before the decay is made")


def _cast(subject: Subject) -> Subject:
    """Of a network that is the subject's forward itself."""
    if subject.forward is not subject.module:
        raise NotChecked("needs the subject in bfloat16 (cast=)")
    module = copy.deepcopy(subject.module).to(torch.bfloat16)
    return Subject(
        forward=module, vocabulary=subject.vocabulary, tokens=subject.tokens, module=module, gates=subject.gates
    )


class GateWatch(TorchDispatchMode):
    """Follows gates through elementwise functions. `first`: the module, function and dtype of the first delicate one in
    fewer bits than float32."""

    def __init__(self, module: nn.Module, found: list[Tensor]):
        super().__init__()
        self.first: tuple[str, str, str] | None = None
        # Kept alive, so that no other tensor takes an id.
        self._followed = {id(each): each for each in found}
        self._inside: list[str] = []
        self._hooks = []
        for name, each in module.named_modules():
            self._hooks.append(each.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
            self._hooks.append(each.register_forward_hook(self._leave, always_call=True))

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        packet = function.overloadpacket
        if packet in PASSED_ON and any(id(x) in self._followed for x in given):
            result = out[0] if isinstance(out, tuple) else out
            self._followed[id(result)] = result
            if packet in DELICATE and self.first is None and result.dtype in (torch.bfloat16, torch.float16):
                self.first = (self._inside[-1] if self._inside else "", str(packet)[5:], str(result.dtype)[6:])
        return out
