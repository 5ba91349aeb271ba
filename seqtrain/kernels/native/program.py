"""A recorded function as a program that the library runs in one call: its memory is laid out once.

Operations that there is no instruction for are PyTorch's own, between two runs of instructions.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seqtrain.kernels.native.build import library
from seqtrain.kernels.native.calls import check
from seqtrain.kernels.native.lowering import (
    DTYPES,
    MOST_DIMENSIONS,
    Lowering,
    NoInstructionError,
    Step,
    contiguous_view,
)
from seqtrain.kernels.native.recorder import Call, Level, Recorder, Storage, View

# Bytes that storages of a program's memory begin at multiples of.
ALIGNMENT = 64
# Multiply-adds from which an instruction is divided among threads.
SHARED_WORK = 1 << 16


class _Operand(ctypes.Structure):
    """`Operand` of step_elements.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("slot", "dtype", "marks", "absent")),
        ("offset", ctypes.c_int64),
        ("strides", ctypes.c_int64 * MOST_DIMENSIONS),
    ]


class _Instruction(ctypes.Structure):
    """`Instruction` of step_elements.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("code", "operation", "type", "dims", "operands", "first", "threads", "reduced")
        ),
        ("sizes", ctypes.c_int64 * MOST_DIMENSIONS),
        ("ints", ctypes.c_int64 * 8),
        ("scalars", ctypes.c_double * 4),
    ]


@cache
def _names() -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of instructions and of elementwise operations."""
    found = library()
    found.seqtrain_program_names.restype = ctypes.c_char_p
    found.seqtrain_program_sizes.restype = ctypes.c_int64
    found.seqtrain_program_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, *3 * (ctypes.c_void_p,)]
    sizes = 1000 * ctypes.sizeof(_Instruction) + ctypes.sizeof(_Operand)
    assert found.seqtrain_program_sizes() == sizes, (found.seqtrain_program_sizes(), sizes)
    instructions, operations = found.seqtrain_program_names().decode().split("\n")
    return tuple({name: n for n, name in enumerate(names.split())} for names in (instructions, operations))  # type: ignore[return-value]


@dataclass(frozen=True)
class Kept:
    """Keys and values that grow, for one call: their buffers `[B,capacity,G,K]`, the first row kept, rows kept."""

    k: Tensor
    v: Tensor
    start: int
    rows: int


class _Part:
    """Instructions that run one after the other."""

    def __init__(self, steps: Sequence[Step], slots: dict[Storage, tuple[int, int]], threads: int):
        codes, operations = _names()
        self.count = len(steps)
        self.instructions = (_Instruction * len(steps))()
        self.operands = (_Operand * sum(len(step.operands) for step in steps))()
        first = 0
        for instruction, step in zip(self.instructions, steps, strict=True):
            name = step.operation
            instruction.code = codes[step.code]
            instruction.operation = operations[name] if isinstance(name, str) else name
            instruction.type, instruction.dims, instruction.reduced = step.type, len(step.sizes), step.reduced
            instruction.operands, instruction.first = len(step.operands), first
            instruction.threads = threads if step.work >= SHARED_WORK else 1
            for target, values in (
                (instruction.sizes, step.sizes),
                (instruction.ints, step.ints),
                (instruction.scalars, step.scalars),
            ):
                target[: len(values)] = values
            for view, strides in zip(step.operands, step.strides, strict=True):
                _fill(self.operands[first], view, strides, slots)
                first += 1

    def run(self, slots: Any, numbers: Any) -> None:
        check(library().seqtrain_program_run(self.instructions, self.count, self.operands, slots, numbers))


def _fill(operand: _Operand, view: View | None, strides: Sequence[int], slots: dict[Storage, tuple[int, int]]) -> None:
    operand.absent = view is None
    if view is None:
        return
    slot, offset = slots[view.storage]
    operand.slot, operand.offset = slot, offset + view.offset
    operand.dtype, operand.marks = DTYPES[view.dtype], view.conjugated + 2 * view.negated
    operand.strides[: len(strides)] = strides


class Program:
    """What a recorder saw, to be run again on other tensors of the same shapes and dtypes.

    `outs`: what a run gives, as it lay when recorded; each becomes a contiguous tensor. `kept`: how many pairs of keys
    and values grow. `why`: for each operation that is not the library's, by name, how often it is called.
    """

    def __init__(self, recorder: Recorder, outs: Sequence[View], *, kept: int, threads: int):
        self.kept, self.why = kept, dict[str, int]()
        calls = _needed(_settled(recorder.calls), [view.storage for view in outs])
        begins = [call for call in calls if all(out.storage.level < Level.GIVEN for out in call.outs)]
        follows = [call for call in calls if any(out.storage.level == Level.GIVEN for out in call.outs)]
        self._places: dict[Storage, tuple[int, int]] = {}
        self._held: list[Tensor | None] = []
        given: dict[int, Storage] = {}
        self._outs: list[Storage] = []
        first, main = _lowered(begins), _lowered(follows)
        ends = Lowering()
        for view in outs:
            # What lies alone and as it should is written where it goes.
            whole = view.contiguous and view.numel * view.dtype.itemsize == view.storage.nbytes
            if whole and view.storage.made and view.storage.level == Level.GIVEN and view.storage not in self._outs:
                self._outs.append(view.storage)
                continue
            storage = Storage(view.numel * view.dtype.itemsize, Level.GIVEN)
            self._outs.append(storage)
            ends.copy(contiguous_view(view.shape, view.dtype, storage), view)
        main.append(ends.steps)
        for part in (*first, *main):
            for view in _views(part):
                if view.storage.given >= 0:
                    given[view.storage.given] = view.storage
        written = set(self._outs)
        own = {storage for part in first for view in _views(part) if (storage := view.storage).made}
        self._lay(_arena(first, own, reuse=False), own, "learned")
        others = {storage for part in main for view in _views(part) if (storage := view.storage).made} - own - written
        self._lay(_arena(main, others, reuse=True), others, "made")
        self._slots_of_kept = [[self._slot(None), self._slot(None)] for _ in range(kept)]
        self._slots_of_outs = [self._slot(None) for _ in outs]
        for storage, slot in zip(self._outs, self._slots_of_outs, strict=True):
            self._places[storage] = (slot, 0)
        self._slots_of_given = {number: self._slot(None) for number in sorted(given)}
        for number, storage in given.items():
            self._places[storage] = (self._slots_of_given[number], 0)
        for part in (*first, *main):
            for view in _views(part):
                self._place(view.storage)
        # Slots of tensors that may lie within a storage.
        self._moving = {*self._slots_of_given.values(), *self._slots_of_outs}
        self._table = (ctypes.c_void_p * len(self._held))()
        for n, tensor in enumerate(self._held):
            if tensor is not None:
                self._table[n] = tensor.untyped_storage().data_ptr()
        self._numbers = (ctypes.c_int64 * max(1, 3 * kept))()
        self._first = [self._part(part, threads) for part in first]
        self._main = [self._part(part, threads) for part in main]
        self.instructions = sum(part.count for part in self._main if isinstance(part, _Part))

    def begin(self) -> None:
        """Computes again what follows from weights alone."""
        self._run(self._first)

    def run(self, given: Sequence[Tensor], kept: Sequence[Kept], outs: Sequence[Tensor]) -> None:
        """Writes `outs`; adds a row to each of `kept`, of which only the buffers are read. These are contiguous."""
        table, held = self._table, self._held
        for number, slot in self._slots_of_given.items():
            held[slot] = tensor = given[number].contiguous()
            table[slot] = tensor.data_ptr()
        for slot, out in zip(self._slots_of_outs, outs, strict=True):
            held[slot] = out
            table[slot] = out.data_ptr()
        for n, (each, (slot_k, slot_v)) in enumerate(zip(kept, self._slots_of_kept, strict=True)):
            table[slot_k], table[slot_v] = each.k.data_ptr(), each.v.data_ptr()
            self._numbers[3 * n : 3 * n + 3] = [each.start, each.rows, each.k.shape[1]]
        self._run(self._main)

    def _run(self, parts: Sequence[Any]) -> None:
        for part in parts:
            if isinstance(part, _Part):
                part.run(self._table, self._numbers)
            else:
                self._call(part)

    def _call(self, call: Call) -> None:
        args, kwargs = tree_map(lambda x: self._tensor(x) if isinstance(x, View) else x, (call.args, call.kwargs))
        found = call.function(*args, **kwargs)
        places = {view.storage for view in call.inputs}
        for view, out in zip(call.outs, [found] if isinstance(found, Tensor) else found, strict=True):
            if view.storage not in places:
                self._tensor(view).copy_(out)

    def _tensor(self, view: View) -> Tensor:
        slot, offset = self._places[view.storage]
        held = self._held[slot]
        assert held is not None
        first = offset + view.offset
        if slot in self._moving:
            first += int(held.storage_offset()) * held.itemsize
        whole = torch.empty(0, dtype=view.dtype).set_(
            held.untyped_storage(), first // view.dtype.itemsize, view.shape, view.strides
        )
        whole = whole.conj() if view.conjugated else whole
        return torch._neg_view(whole) if view.negated else whole

    def _slot(self, tensor: Tensor | None) -> int:
        self._held.append(tensor)
        return len(self._held) - 1

    def _place(self, storage: Storage) -> None:
        if storage in self._places:
            return
        if storage.kept >= 0:
            pair = self._slots_of_kept[storage.kept // 2]
            self._places[storage] = (pair[storage.kept % 2], 0)
            return
        assert storage.tensor is not None, storage
        self._places[storage] = (self._slot(storage.tensor), 0)

    def _lay(self, offsets: dict[Storage, int], storages: set[Storage], name: str) -> None:
        size = max((offset + storage.nbytes for storage, offset in offsets.items()), default=0)
        memory = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
        skip = -memory.data_ptr() % ALIGNMENT
        slot = self._slot(memory)
        for storage, offset in offsets.items():
            self._places[storage] = (slot, skip + offset)

    def _part(self, part: Any, threads: int) -> Any:
        if isinstance(part, Call):
            self.why[part.name] = self.why.get(part.name, 0) + 1
            return part
        return _Part(part, self._places, threads)


def _settled(calls: Sequence[Call]) -> Sequence[Call]:
    """Levels of storages that are written more than once: the highest of what they are written from."""
    changed = True
    while changed:
        changed = False
        for call in calls:
            level = max((view.storage.level for view in call.inputs), default=Level.LEARNED)
            for out in call.outs:
                if out.storage.level < level:
                    out.storage.level, changed = level, True
    return calls


def _needed(calls: Sequence[Call], storages: Sequence[Storage]) -> list[Call]:
    """Those that the storages follow from."""
    wanted, found = set(storages), []
    for call in reversed(calls):
        if any(out.storage in wanted or out.storage.kept >= 0 for out in call.outs):
            wanted.update(view.storage for view in call.inputs)
            found.append(call)
    return found[::-1]


def _lowered(calls: Sequence[Call]) -> list[Any]:
    """Lists of steps, and between them calls that there is no instruction for."""
    parts: list[Any] = []
    lowering = Lowering()
    for call in calls:
        try:
            lowering.add(call)
        except NoInstructionError:
            if call.special:
                raise
            parts += [lowering.steps, call]
            lowering = Lowering()
    return [*parts, lowering.steps]


def _views(part: Any) -> list[View]:
    if isinstance(part, Call):
        return [*part.inputs, *part.outs]
    return [view for step in part for view in step.operands if view is not None]


def _arena(parts: Sequence[Any], storages: set[Storage], *, reuse: bool) -> dict[Storage, int]:
    """An offset for each storage; with `reuse`, where those lie that are not needed at the same time may overlap."""
    spans: dict[Storage, list[int]] = {}
    moments: list[Sequence[View]] = []
    for part in parts:
        moments += [_views(part)] if isinstance(part, Call) else [_views([step]) for step in part]
    for moment, views in enumerate(moments):
        for view in views:
            if view.storage in storages:
                spans.setdefault(view.storage, [moment, moment])[1] = moment
    free: list[tuple[int, int]] = []
    ends: dict[int, list[Storage]] = {}
    found: dict[Storage, int] = {}
    top = 0
    order = sorted(spans, key=lambda storage: spans[storage][0])
    moment = 0
    for storage in order:
        start, end = spans[storage]
        while reuse and moment < start:
            for gone in ends.pop(moment, ()):
                free.append((_room(gone), found[gone]))
            moment += 1
        room = _room(storage)
        fitting = min((each for each in free if each[0] >= room), default=None)
        if fitting is None:
            found[storage] = top
            top += room
        else:
            free.remove(fitting)
            found[storage] = fitting[1]
            if fitting[0] > room:
                free.append((fitting[0] - room, fitting[1] + room))
        ends.setdefault(end, []).append(storage)
    return found


def _room(storage: Storage) -> int:
    return -(-max(1, storage.nbytes) // ALIGNMENT) * ALIGNMENT
