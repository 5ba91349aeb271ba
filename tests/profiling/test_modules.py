"""Hooks that follow a model: every part is met in every pass, and nothing is left on the model afterwards."""

from collections import Counter
from itertools import groupby

import torch

from seqtrain.profiling.modules import mixer_name, watched_model, watched_modules
from seqtrain.profiling.parts import BACKWARD, FORWARD, OTHER, RECOMPUTATION, Part, Timeline, seconds_by_part
from tests.profiling.profiling_cases import CountingClock, small_model

NORM = "norm, residual"


def step(model, timeline):
    """A step's spans, the backward pass in a part of its own."""
    tokens = torch.arange(8)[None] % 11
    with watched_model(model, timeline):
        timeline.start()
        loss = model(tokens, labels=tokens)
        with timeline.during(Part("other", BACKWARD)):
            loss.backward()
        return timeline.stop()


def triples(values):
    """Each value between its neighbors."""
    return zip(values, values[1:], values[2:], strict=False)


def test_every_module_is_met_forward_and_backward_and_the_parts_sum_to_the_step():
    clock, model = CountingClock(), small_model()
    spans = step(model, Timeline(clock))
    found = seconds_by_part(spans)
    for phase in (FORWARD, BACKWARD):
        expected = {("gla", 0), ("attention", 1), ("mlp", 0), ("mlp", 1), (NORM, 0), (NORM, 1), (NORM, -1)}
        expected |= {("embedding", -1), ("loss", -1)}
        met = {(part.kind, part.layer) for part in found if part.phase == phase and part.kind != OTHER.kind}
        assert met == expected
    assert RECOMPUTATION not in {part.phase for part in found}
    assert sum(found.values()) == clock.time - 1.0
    # Backward goes through the modules in reverse.
    order = [(span.part.kind, span.part.layer) for span in spans if span.part.phase == BACKWARD]
    kinds = [entry for entry in order if entry[0] in ("gla", "attention", "mlp", "loss", "embedding")]
    assert kinds == [("loss", -1), ("mlp", 1), ("attention", 1), ("mlp", 0), ("gla", 0), ("embedding", -1)]
    # Nothing is left on the model.
    ended = clock.time
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).backward()
    assert clock.time == ended


def test_recomputation_is_a_pass_of_its_own():
    spans = step(small_model(activation_checkpointing=True), Timeline(CountingClock()))
    again = Counter((span.part.kind, span.part.layer) for span in spans if span.part.phase == RECOMPUTATION)
    assert {("gla", 0), ("attention", 1), ("mlp", 0), ("mlp", 1)} <= set(again)
    # A recomputation ends with an exception; after it, what it interrupted resumes.
    runs = [(again, list(own)) for again, own in groupby(spans, lambda span: span.part.phase == RECOMPUTATION)]
    interrupted = [(before[-1].part, after[0].part) for (_, before), (again, _), (_, after) in triples(runs) if again]
    assert len(interrupted) == 2
    assert all(before == after and before.phase == BACKWARD for before, after in interrupted)
    assert spans[-1].part == OTHER


def test_a_pass_without_gradients_is_one_that_is_made_again():
    model, timeline = small_model(), Timeline(CountingClock())
    with watched_model(model, timeline), torch.no_grad():
        timeline.start()
        model(torch.arange(8)[None])
        phases = {span.part.phase for span in timeline.stop() if span.part != OTHER}
    assert phases == {RECOMPUTATION}


def test_modules_inside_a_mixer_are_part_of_it():
    model = small_model(layers=("gated_delta_net", "gla"))
    watched = watched_modules(model)
    kinds = [(kind, layer) for module, kind, layer in watched if kind not in (NORM, "mlp")]
    assert kinds == [("embedding", -1), ("gated_delta_net", 0), ("gla", 1), ("loss", -1)]
    assert mixer_name(model.blocks[0].mixer) == "gated_delta_net"
    inside = set(model.blocks[0].mixer.modules()) - {model.blocks[0].mixer}
    assert not inside & {module for module, _, _ in watched}
