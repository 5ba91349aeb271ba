"""Figures of other conversions stand beside one's own only where they can be compared."""

import copy
import json

import pytest

from seqtrain.convert.report import read_others
from tests.command_cases import refused

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
