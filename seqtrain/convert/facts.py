"""Made-up text that can only be predicted by whoever remembers it: facts that are asked for, passages that are copied.

Names and numbers are drawn anew for every document, so that nothing of it is in any model's weights, and what is asked
for lies anywhere before, most of it far beyond a window.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

from seqtrain.files import replacing

# Characters of a token, on average, in such text by such tokenizers as of SmolLM2: names and numbers are cut finely.
CHARACTERS = 2.5
SYLLABLES = ("ba", "del", "fo", "gri", "har", "jun", "ka", "lim", "mo", "nev", "or", "pas", "qui", "ros", "tav", "ul")
THINGS = ("code", "locker number", "birth year", "street number", "radio channel", "account", "train", "room")
PEOPLE = ("pilot", "baker", "judge", "sailor", "teacher", "farmer", "nurse", "clerk")
PLACES = ("harbour", "mill", "station", "market", "bridge", "tower", "garden", "library")
VERBS = ("walked to", "painted", "left", "looked for", "wrote about", "waited at", "came back from", "sold")
WORDS = ("stone", "river", "seven", "amber", "cloud", "paper", "north", "silver", "maple", "ocean", "ember", "quiet",
         "copper", "winter", "signal", "garden")  # fmt: skip


def write_facts(folder: Path, *, tokens: int, length: int, seed: int) -> Path:
    """Writes so many tokens of text or more into `folder`, a document of about `length` tokens a file; the folder.

    The same arguments write the same text. A folder that is there already is taken as it is.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as unfinished:
            unfinished.mkdir()
            for number in range(tokens // length + 1):
                content = document(Random(f"{seed}/{number}"), int(CHARACTERS * length))
                (unfinished / f"{number:06d}.txt").write_text(content, encoding="utf-8")
    return folder


def document(chance: Random, characters: int) -> str:
    """One text of at least so many characters."""
    facts: list[tuple[str, str, int]] = []
    notes: list[str] = []
    written: list[str] = []

    def fact() -> str:
        facts.append((_name(chance), chance.choice(THINGS), chance.randrange(1000, 10000)))
        name, thing, value = facts[-1]
        return f"The {thing} of {name} is {value}."

    def question() -> str:
        name, thing, value = chance.choice(facts)
        return f"Question: what is the {thing} of {name}? Answer: {value}."

    def word() -> str:
        # Few of them follow from the one before, whatever a model knows.
        return chance.choice((chance.choice(WORDS), _made_up(chance), str(chance.randrange(10, 1000))))

    def note() -> str:
        notes.append(" ".join(word() for _ in range(chance.randrange(6, 13))))
        return f"Note {len(notes)}: {notes[-1]}."

    def copy() -> str:
        number = chance.randrange(len(notes))
        return f"Note {number + 1} again: {notes[number]}."

    def filler() -> str:
        return f"The {chance.choice(PEOPLE)} {chance.choice(VERBS)} the {chance.choice(WORDS)} {chance.choice(PLACES)}."

    makers: tuple[Callable[[], str], ...] = (fact, note, filler, question, copy)
    size = 0
    while size < characters:
        # Nothing is asked for that has not been said.
        [make] = chance.choices(makers, (3, 1, 3, 4 if facts else 0, 2 if notes else 0))
        written.append(make())
        size += len(written[-1]) + 1
    return " ".join(written) + "\n"


def _name(chance: Random) -> str:
    first, last = (_made_up(chance).capitalize() for _ in range(2))
    return f"{first} {last}"


def _made_up(chance: Random) -> str:
    return "".join(chance.choices(SYLLABLES, k=2))
