"""What is measured of a student: against its teacher, without its parts, beyond its window, and what training gave."""

import dataclasses
import math

import pytest
import torch

from seqtrain.convert import measure
from seqtrain.convert.measure import Text
from seqtrain.convert.settings import VerifyConfig
from seqtrain.convert.verify import check_generation, gap_closed, goals
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.testing import relative_error
from tests.convert.convert_cases import some_tokens
from tests.convert.test_student import make_pair


@pytest.fixture(scope="module")
def pair(transformers_on_disk):
    _, folder = transformers_on_disk("smollm2")
    return make_pair(folder, "delta_net", window=8, memory_weight=0.9)


@pytest.fixture(scope="module")
def evaluator(pair):
    return measure.Evaluator(
        pair[0],
        [Text("one", "one.txt", some_tokens(2, 70)), Text("two", "two.txt", some_tokens(1, 90, seed=4))],
        distances=[8, 64, 1000],
    )


def test_scores_are_those_of_whole_logits(pair):
    """In chunks of tokens, with 2 rows longer than a chunk, nothing is lost at their boundaries."""
    tokens = some_tokens(2, 300)
    hidden = [measure.hidden_states(model, tokens) for model in pair]
    with torch.no_grad():
        logits = [model(tokens, all_logits=True)[0].double() for model in pair]
    entropy = torch.nn.functional.cross_entropy(logits[1][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert math.log(measure.perplexity(measure.surprise(pair[1], hidden[1], tokens))) == pytest.approx(
        float(entropy), rel=1e-6
    )
    log_p, log_q = (each.log_softmax(-1) for each in logits)
    divergence, same = measure.agreement(pair[0], hidden[0], pair[1], hidden[1])
    assert divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert same == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    assert divergence > 0.01


def test_positions_double_and_their_mean_is_the_whole(pair):
    surprises = torch.rand(3, 199, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = measure.by_position({"it": surprises})
    assert [(row["from"], row["to"]) for row in rows] == [(1, 64), (64, 128), (128, 200)]
    mean = sum(math.log(row["it"]) * (row["to"] - row["from"]) for row in rows) / 199
    assert mean == pytest.approx(float(surprises.mean()))
    assert rows[1]["it"] == pytest.approx(measure.perplexity(surprises[:, 63:127]))


def test_a_measure_says_what_each_part_is_worth(pair, evaluator):
    came = evaluator.measure(pair[1])
    models = {"teacher", "student", "student, memory off", "student, window off"}
    for text in ("one", "two"):
        found = came["texts"][text]
        assert set(found["perplexity"]) == models
        assert len(set(found["perplexity"].values())) == 4
        assert set(found["by_position"][0]) == models | {"from", "to"}
    assert came["texts"]["one"]["tokens"] == 140
    assert [row["tokens_between"] for row in came["recall"]] == [8, 64]
    assert all(set(row) == models | {"tokens_between"} for row in came["recall"])
    assert evaluator.measure(pair[1]) == came
    assert all(mixer.without == "" for mixer in measure.converted_mixers(pair[1]))


def test_a_teacher_is_measured_as_itself(pair, evaluator):
    came = evaluator.measure(pair[0])
    assert came["layer_errors"] == [0.0, 0.0, 0.0]
    for found in came["texts"].values():
        assert set(found["perplexity"]) == {"teacher", "student"}
        assert found["perplexity"]["teacher"] == found["perplexity"]["student"]
        assert (found["kl_to_teacher"], found["top1_agreement"]) == (pytest.approx(0.0, abs=1e-9), 1.0)


@torch.no_grad()
def test_a_layers_error_is_its_own(pair):
    """On the teacher's input: what the layers before it do wrong does not count."""
    teacher, student = pair
    tokens = some_tokens(1, 50)
    errors = measure.layer_errors(teacher, student, tokens)
    assert min(errors) > 1e-3
    x = teacher.blocks[0](teacher.embedding(tokens))[0]
    expected, _ = teacher.blocks[1].mixer(teacher.blocks[1].mixer_norm(x))
    came, _ = student.blocks[1].mixer(teacher.blocks[1].mixer_norm(x))
    assert errors[1] == pytest.approx(relative_error(came, expected))
    replaced, student.blocks[0].mixer = student.blocks[0].mixer, teacher.blocks[0].mixer
    try:
        assert measure.layer_errors(teacher, student, tokens) == [0.0, *errors[1:]]
    finally:
        student.blocks[0].mixer = replaced


def test_alternating_layers_can_be_switched_off_too(transformers_on_disk):
    _, folder = transformers_on_disk("llama")
    _, student = make_pair(folder, "gla", window=8, sinks=3, arrangement="alternate")
    assert measure.sinks_of(student) == 3
    tokens = some_tokens(1, 40)
    outs = [measure.hidden_states(student, tokens)]
    for part in ("memory", "window"):
        with measure.switched_off(student, part) as found:
            assert found
            outs.append(measure.hidden_states(student, tokens))
    assert min(relative_error(a, b) for a, b in zip(outs, outs[1:] + outs[:1], strict=True)) > 1e-3


def test_repeated_passages_lie_beyond_the_window():
    tokens = measure.repeated_passages(some_tokens(2, 60), 8, 4, 30, rows=3)
    # Rows are cut from all tokens, one after the other.
    assert tokens.shape == (2, 42)
    assert torch.equal(tokens[:, 4:12], tokens[:, 34:])
    assert torch.equal(tokens[:, 12:34], some_tokens(2, 60).flatten()[:84].view(2, 42)[:, 12:34])
    assert not torch.equal(tokens[0, 4:12], tokens[1, 4:12])
    assert measure.repeated_passages(some_tokens(2, 60), 8, 4, 30, rows=1).shape == (1, 42)
    assert measure.repeated_passages(some_tokens(2, 60), 8, 4, 109, rows=3) is None


MARKERS, FILL, ASKED = 6, 6, 7


def marked_rows(rows, generator):
    """A marker, text in which it does not occur for longer than the window, a question, and the marker again."""
    marker = torch.randint(MARKERS, (rows, 1), generator=generator)
    start, fill = torch.full((rows, 2), FILL), torch.full((rows, 14), FILL)
    return torch.cat([start, marker, fill, torch.full((rows, 1), ASKED), marker], 1)


# Not from every seed does so small a model learn it in 50 steps.
@pytest.mark.parametrize(("memory", "seed"), [("gla", 1), pytest.param("gated_delta_net", 3, marks=pytest.mark.all)])
def test_recall_beyond_the_window_is_the_memorys(memory, seed):
    """A tiny trained model answers from 15 tokens back, with a window of 4; without its memory it guesses."""
    torch.manual_seed(seed)
    mixer = MIXERS.get("linearized_attention").Config(memory=memory, window=4, sinks=2, memory_weight=0.5)
    config = ModelConfig(layers=("linearized_attention",), depth=1, width=32, heads=2, initializer_range=0.3)
    model = LanguageModel(config, {"linearized_attention": mixer}, ASKED + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rows = marked_rows(32, generator)
        labels = torch.full_like(rows[:, :-1], -100)
        labels[:, -1] = rows[:, -1]
        optimizer.zero_grad()
        (model(rows[:, :-1], labels) / 32).backward()
        optimizer.step()
    tokens = marked_rows(64, generator)
    whole = measure.recall(model, tokens, 1)
    with measure.switched_off(model, "memory") as found:
        assert found
        without = measure.recall(model, tokens, 1)
    assert whole["accuracy"] == 1.0
    assert without["accuracy"] < 2 / MARKERS
    assert without["surprise"] > whole["surprise"] + 1.0


def measured(*, layers, student, off, teacher=10.0, alike=3):
    perplexities = {"teacher": teacher, "student": student, "student, memory off": off}
    return {
        "layer_errors": layers,
        "texts": {"prose": {"perplexity": perplexities}},
        "answer": {"tokens_alike": alike},
    }


START = measured(layers=[0.2, 0.0, 0.3], student=25.0, off=20.0)


def test_the_gap_is_that_of_window_and_sinks():
    assert gap_closed(START, measured(layers=[], student=15.0, off=16.0)) == {"prose": 0.5}
    # A start that is better as a whole is what must be beaten.
    assert gap_closed(measured(layers=[], student=18.0, off=20.0), measured(layers=[], student=14.0, off=16.0)) == {
        "prose": 0.5
    }
    assert gap_closed(measured(layers=[], student=9.0, off=9.0), measured(layers=[], student=9.0, off=9.0)) == {
        "prose": None
    }


@pytest.mark.parametrize(
    ("end", "missed"),
    [
        (measured(layers=[0.1, 0.0, 0.2], student=15.0, off=16.0), []),
        (measured(layers=[0.1, 0.0, 0.3], student=15.0, off=16.0), ["a layer's error"]),
        (measured(layers=[0.1, 0.0, 0.2], student=17.0, off=18.0), ["prose: part of the gap"]),
        (measured(layers=[0.1, 0.0, 0.2], student=15.0, off=15.0), ["prose: perplexity with the memory"]),
        (measured(layers=[0.1, 0.0, 0.2], student=15.0, off=16.0, alike=0), ["answers that begin otherwise"]),
    ],
)
def test_goals_are_missed_by_name(end, missed):
    wish = dataclasses.replace(VerifyConfig(), gap_closed=0.4)
    found = goals(START, end, wish)
    assert len(found) == 4
    names = [each["name"] for each in found if not each["passed"]]
    assert len(names) == len(missed)
    assert all(name.startswith(beginning) for name, beginning in zip(names, missed, strict=True))
    assert goals(START, end, VerifyConfig()) == []


def test_a_cache_that_grows_is_a_failure_where_it_must_not():
    rows = [{"tokens": 16, "bytes": 100}, {"tokens": 79, "bytes": 101}]
    assert check_generation(rows, constant=False) == []
    assert [each["passed"] for each in check_generation(rows, constant=True)] == [False]
    assert [each["passed"] for each in check_generation([rows[0], rows[0]], constant=True)] == [True]
