"""Which layers keep softmax attention, and which figures of other conversions stand beside one's own."""

import copy
import dataclasses
import json

import pytest
import torch

from seqtrain.convert import importance
from seqtrain.convert.architecture import kept_layers, layers_that_stay, write_layers
from seqtrain.convert.importance import combined, hessian_traces, rank_correlations, restore_one_layer
from seqtrain.convert.report import read_others
from tests.command_cases import refused
from tests.convert.convert_cases import some_tokens
from tests.convert.test_student import make_pair


@pytest.mark.parametrize(
    ("keep", "kept"), [("none", ()), ("every:2", (1, 3, 5)), ("every:4", (3,)), ((5, 0), (0, 5)), ("budget:2", (1, 4))]
)
def test_policies_choose_layers(keep, kept):
    scores = [0.0, 3.0, 1.0, 1.0, 2.0, -1.0]
    assert kept_layers(keep, 6, lambda: scores) == (kept, scores if keep == "budget:2" else None)


def test_a_budget_goes_to_the_layer_whose_attention_is_missed(transformers_on_disk):
    """Of three layers, two are given a window over everything, so that only the third loses anything."""
    _, folder = transformers_on_disk("llama")
    teacher, student = make_pair(folder, "gla", window=64)
    blind = dataclasses.replace(student.blocks[1].mixer.config, window=2, sinks=0)
    student.blocks[1].mixer.config = blind
    scores = restore_one_layer(student, teacher, some_tokens(2, 60), 30, lambda name: None)
    assert list(scores) == ["kl", "recall"]
    for values in scores.values():
        assert abs(values[1]) > 1e-3
        assert values[0] == pytest.approx(0.0, abs=1e-5)
        assert values[2] == pytest.approx(0.0, abs=1e-5)
    assert kept_layers("budget:1", 3, lambda: scores["kl"])[0] == (1,)
    # Without room for a passage there is no recall to measure.
    assert list(restore_one_layer(student, teacher, some_tokens(1, 20), 30, lambda name: None)) == ["kl"]


def test_scores_are_combined_and_compared():
    scores = {"kl": [1.0, 2.0, 0.5, 0.0], "recall": [0.0, 2.0, 4.0, -1.0], "trace": [4.0, 3.0, 2.0, 1.0]}
    assert combined(scores, "trace") == scores["trace"]
    assert combined(scores, "both") == pytest.approx([0.25, 0.75, 0.625, -0.125])
    per_kl = combined(scores, "recall_per_kl")
    assert per_kl == pytest.approx([0.0, 2 / 2.01, 4 / 0.51, 0.0])
    assert combined({"kl": scores["kl"]}, "both") == scores["kl"]
    found = rank_correlations(scores)
    assert list(found) == ["kl, recall", "kl, trace", "recall, trace"]
    # Ranks 2 3 1 0 and 1 2 3 0: 1 - 6 * 6 / 60.
    assert found["kl, recall"] == pytest.approx(0.4)


def test_a_trace_is_the_mean_of_a_layer_s_diagonal(transformers_on_disk, monkeypatch):
    """Of a matrix that is known; the one of the loss is finite and differs from layer to layer."""
    _, folder = transformers_on_disk("llama")
    teacher, _ = make_pair(folder, "gla")
    tokens = some_tokens(1, 40)
    traces = hessian_traces(teacher, tokens, seed=0)
    assert len(set(traces)) == 3
    assert all(abs(trace) < 10 for trace in traces)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    sizes = [sum(weight.numel() for weight in block.mixer.parameters()) for block in teacher.blocks]
    diagonal = torch.arange(sum(sizes)).double()

    def product_of(loss, weights):
        assert [weight.numel() for weight in weights[:2]] == [64 * 32, 32 * 32]
        assert loss() > 0
        return lambda vector: diagonal * vector

    monkeypatch.setattr(importance, "hessian_product", product_of)
    assert hessian_traces(teacher, tokens, seed=0) == pytest.approx([float(x.mean()) for x in diagonal.split(sizes)])


def test_a_written_choice_is_read_again(tmp_path):
    layers = ["attention", "liger_gla", "sliding_attention", "linearized_attention"]
    assert layers_that_stay(layers) == (0, 2)
    write_layers(tmp_path / "layers.json", layers, [0.5, 0.1, 0.4, 0.2], {"kl": [0.5, 0.1, 0.4, 0.2]})
    assert kept_layers(f"{tmp_path}/layers.json", 4, list) == ((0, 2), [0.5, 0.1, 0.4, 0.2])
    # One made by hand needs no more than numbers.
    (tmp_path / "own.json").write_text('{"keep": [5, 1]}')
    assert kept_layers(f"{tmp_path}/own.json", 6, list) == ((1, 5), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "layers.json: missing; keep takes"),
        ("{", "layers.json: damaged"),
        ("[1, 2]", "or an object with keep"),
        ('{"keep": [1, -1]}', "damaged at keep.1: Input should be greater"),
        ('{"keep": [true]}', "damaged at keep.0: Input should be a valid integer"),
        ('{"keep": [7]}', "has layers 0 to 3, not 7"),
        (json.dumps({"keep": [1], "layers": ["attention"] * 3}), "is of a model with 3 layers, not 4"),
    ],
)
def test_a_choice_that_does_not_fit_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "layers.json").write_text(content)
    with refused(message):
        kept_layers(f"{tmp_path}/layers.json", 4, list)


OTHER = {
    "source": {"sha256": "abc"},
    "texts": {"prose": "hamlet.txt"},
    "config": {"target": "liger_gla", "recipe": {"name": "liger"}, "verify": {"tokens": 512, "sequences": 4}},
    "training": [{"tokens": 100}, {"tokens": 20}],
    "end": {"texts": {"prose": {"perplexity": {"teacher": 5.0, "student": 7.0}}}},
    "gap_closed": {"prose": 0.5},
}


def write(folder, report):
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder)


def test_figures_of_the_same_teacher_on_the_same_texts(tmp_path):
    found = read_others([write(tmp_path / "liger", OTHER)], OTHER)
    assert found == {
        "liger_gla by liger": {
            "tokens_trained": 120,
            "perplexity": {"prose": {"teacher": 5.0, "student": 7.0}},
            "gap_closed": {"prose": 0.5},
        }
    }
    assert read_others([], OTHER) == {}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("source", "sha256"), "other", "can't be compared: not the same source"),
        (("texts", "prose"), "lear.txt", "can't be compared: not the same texts"),
        (("config", "verify", "tokens"), 64, "can't be compared: not the same tokens"),
        (("training",), None, "holds no report of a conversion"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, path, value, message):
    other = copy.deepcopy(OTHER)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    for folder, said in ((write(tmp_path / "other", other), message), (str(tmp_path), "holds no report")):
        with refused(f"beside={folder}: {said}"):
            read_others([folder], OTHER)
