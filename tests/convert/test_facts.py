"""Made-up text: every answer stands before its question, far back for most, and the same seed writes the same."""

import re
from random import Random

from seqtrain.convert.facts import document, write_facts


def test_answers_are_said_before_they_are_asked_for():
    text = document(Random(0), 20000)
    questions = list(re.finditer(r"Question: what is the ([\w ]+) of (\w+ \w+)\? Answer: (\d+)\.", text))
    copies = list(re.finditer(r"Note (\d+) again: ([\w ]+)\.", text))
    assert len(questions) > 50
    assert len(copies) > 20
    back = []
    for asked in questions:
        thing, name, value = asked.groups()
        said = text.index(f"The {thing} of {name} is {value}.")
        assert said < asked.start()
        back.append(asked.start() - said)
    for copied in copies:
        assert text.index(f"Note {copied[1]}: {copied[2]}.") < copied.start()
    # A window of 64 tokens is 200 characters or so.
    assert sum(distance > 1000 for distance in back) > len(back) / 2


def test_the_same_seed_writes_the_same(tmp_path):
    def written(name, seed):
        folder = write_facts(tmp_path / name, tokens=1000, length=300, seed=seed)
        return [file.read_text() for file in sorted(folder.iterdir())]

    first = written("a", 0)
    assert first == written("b", 0) != written("c", 1)
    assert len(set(first)) == 4
    assert min(map(len, first)) > 700
    # What is there is not written again.
    (tmp_path / "a" / "000000.txt").write_text("mine")
    assert written("a", 5)[0] == "mine"
