"""What is kept for the backward pass, by part; a step's peak and what it is made of."""

import mmap
from types import SimpleNamespace

import torch
from torch import nn

from seqtrain.profiling.memory import (
    ACTIVATIONS,
    LOSS,
    PROGRAM,
    WORKING,
    MemoryTimeline,
    ResidentMeter,
    SavedTensors,
    held_by_engine,
    resident_bytes_of,
)
from seqtrain.profiling.modules import watched_model
from seqtrain.profiling.parts import OTHER, Part, Timeline
from seqtrain.runtime.engine import BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS
from tests.profiling.profiling_cases import CountingClock, small_model

FLOAT = 4
LAYER = Part("layer", "forward", 3)


class FakeMeter:
    """Shows what it was set to."""

    def __init__(self, held):
        self.held = self.most = held

    def now(self):
        return self.held

    def peak(self):
        return self.most

    def reset(self):
        self.most = self.held


def engine_of(model, **optimizer):
    inner = torch.optim.AdamW(model.parameters())
    wrapped = SimpleNamespace(optimizer=inner, **optimizer) if optimizer else inner
    return SimpleNamespace(module=model, deepspeed=SimpleNamespace(optimizer=wrapped))


def test_a_storage_counts_once_until_the_last_of_what_was_saved_of_it_is_gone():
    timeline = Timeline(CountingClock())
    timeline.start()
    weight = nn.Parameter(torch.ones(10))
    model = nn.ParameterList([weight])
    saved = SavedTensors(timeline, model)
    with saved.watching():
        timeline.enter(LAYER)
        x = weight * 2.0
        y = (x * x).sum() + (x.view(2, 5) * weight.view(2, 5)).sum()
        timeline.leave()
    key = Part("layer", "", 3)
    # x, whole and as a view of it; the weight itself is not an activation.
    assert saved.bytes == {key: 10 * FLOAT}
    y.backward()
    assert saved.bytes[key] == 0
    # d/dw of (2w)^2 + 2w w
    assert torch.equal(weight.grad, torch.full((10,), 12.0))


def test_a_model_keeps_nothing_after_its_backward_pass():
    model, timeline = small_model(), Timeline(CountingClock())
    saved = SavedTensors(timeline, model)
    tokens = torch.arange(8)[None]
    with watched_model(model, timeline), saved.watching():
        timeline.start()
        loss = model(tokens, labels=tokens)
        kept = {part for part, size in saved.bytes.items() if size}
        assert {Part("gla", "", 0), Part("attention", "", 1), Part("mlp", "", 0), Part("loss")} <= kept
        # The gate and the value of the MLP at least: T x 2 hidden.
        assert saved.bytes[Part("mlp", "", 1)] >= 8 * 2 * model.config.hidden * FLOAT
        loss.backward()
    assert saved.bytes.total() == 0


def test_each_tensor_of_the_engine_counts_once_for_the_first_kind_that_has_it():
    model = nn.Linear(4, 2, bias=False)
    model.weight.grad = torch.zeros(2, 4)
    engine = engine_of(model)
    engine.deepspeed.optimizer.step()
    # Two moments, and a count of steps.
    assert held_by_engine(engine) == {PARAMETERS: 32, GRADIENTS: 32, OPTIMIZER: 2 * 32 + FLOAT, BUFFERS: 0}
    sharded = engine_of(
        model, averaged_gradients={0: [model.weight.grad, torch.zeros(3)]}, flat=[model.weight.data, torch.zeros(5)]
    )
    assert held_by_engine(sharded) == {PARAMETERS: 32, GRADIENTS: 32 + 12, OPTIMIZER: 0, BUFFERS: 20}


def test_the_kinds_sum_to_the_peak_and_the_peak_has_its_moment():
    model, meter = nn.Linear(4, 2, bias=False), FakeMeter(1000)
    timeline = MemoryTimeline(CountingClock(), meter, engine_of(model))
    timeline.start()
    timeline.saved.bytes[Part("layer", "", 3)] = 200
    timeline.saved.bytes[Part(LOSS)] = 50
    timeline.enter(LAYER)
    # Held while the layer ran, gone before it ended: as in its backward pass.
    meter.most, meter.held = 1500, 1250
    timeline.saved.bytes[Part("layer", "", 3)] = 0
    timeline.leave()
    meter.held = 1100
    reading = timeline.read()
    assert (reading.peak_bytes, reading.peak_part, reading.resting_bytes) == (1500, LAYER, 1000)
    held = {PARAMETERS: 32, GRADIENTS: 0, OPTIMIZER: 0, BUFFERS: 0, PROGRAM: 1000 - 32}
    assert reading.kinds == held | {LOSS: 50, ACTIVATIONS: 200, WORKING: 1500 - 968 - 32 - 250}
    assert sum(reading.kinds.values()) == reading.peak_bytes
    samples = [(sample.part, sample.peak_bytes) for sample in reading.samples]
    assert samples == [(OTHER, 1000), (LAYER, 1500), (OTHER, 1250)]
    assert reading.layers_most == {Part("layer", "", 3): 200, Part(LOSS): 50}


def test_memory_that_was_never_written_to_does_not_count():
    # Not from the heap, where memory may be left over that was written to.
    held = mmap.mmap(-1, 2**26, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    untouched = torch.frombuffer(held, dtype=torch.uint8)
    address = untouched.untyped_storage().data_ptr()
    assert resident_bytes_of(address, 2**26) < 2**20
    untouched[: 2**24].fill_(1)
    assert 2**24 <= resident_bytes_of(address, 2**26) < 2**24 + 2**22


def test_the_resident_peak_can_be_reset():
    meter = ResidentMeter()
    meter.reset()
    before = meter.now()
    large = torch.ones(2**24)
    assert meter.peak() >= before + 2**25
    del large
    meter.reset()
    assert meter.peak() < before + 2**25
