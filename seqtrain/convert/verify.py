"""What a converted model keeps of its teacher, and whether its forms of computing agree.

A conversion calls, in this order (`convert/run.py`):

    texts = read_texts(config.verify, source, seed=config.seed)     # list[Text]: held out, never to be trained on
    judge = Judge(teacher, texts, tokenizer=load_tokenizer(source), prompt=config.verify.prompt)
    start = judge.measure(student)                                  # a dict for JSON, `layer_errors: list[float]` in it
    found = start_checks(teacher, student, texts[0].tokens[:1])     # list of checks
    ...                                                             # training
    end = judge.measure(student)                                    # `start` again where nothing was trained
    found += end_checks(student, texts[0].tokens[:1]) + goals(start, end, config.verify)

and gives `report.write(folder, report, run)` the dict `report` (the same byte for byte on every run: no path, no time)
with `start`, `end`, `checks` in it, and `run`: what differs from run to run. The teacher must stay what it was.
`layer_errors(teacher, student, tokens)` can be called alone, at any time: each layer on its teacher's own input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.ablation import PARTS, Converted, converted_mixers, seen_by, switched_off
from seqtrain.convert.scores import (
    agreement,
    by_position,
    hidden_states,
    perplexity,
    recall,
    repeated_passages,
    surprise,
)
from seqtrain.convert.settings import VerifyConfig
from seqtrain.convert.texts import Text, read_texts
from seqtrain.mixers.common.liger import Liger
from seqtrain.mixers.linearized_attention import LinearizedAttention
from seqtrain.models import LanguageModel, generate
from seqtrain.testing import relative_error

__all__ = [
    "Judge",
    "cache_bytes",
    "check_generation",
    "end_checks",
    "gap_closed",
    "goals",
    "layer_errors",
    "read_texts",
    "start_checks",
]

# Largest relative error between two ways to compute the same numbers, by the dtype of weights.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# And between a student that sees all a teacher sees and its teacher.
IDENTITY = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CACHE_LENGTHS = (1024, 8192, 65536)
# Tokens of the answer to the prompt.
ANSWER = 8
# Tokens of a passage that comes again, and texts it is put into.
PASSAGE, PASSAGES = 16, 2
# What counts as smaller: less than this part of what it was.
SMALLER = 0.9999


class Judge:
    """Measures students against a teacher, whose own answers are found once."""

    def __init__(self, teacher: LanguageModel, texts: Sequence[Text], *, tokenizer: Any = None, prompt: str = ""):
        """`tokenizer`: of Hugging Face, for the `prompt` both are to go on with; without either, nobody is asked."""
        self.teacher = teacher
        self.texts = texts
        self.tokenizer = tokenizer
        self.prompt = prompt if tokenizer is not None else ""
        self._hidden = {text.name: hidden_states(teacher, text.tokens) for text in texts}
        self._surprise = {text.name: surprise(teacher, self._hidden[text.name], text.tokens) for text in texts}
        self._answer = self._asked(teacher)

    def measure(self, student: LanguageModel) -> dict[str, Any]:
        """Layer errors, and for each text perplexity with all parts and without, divergence, agreement; recall."""
        found: dict[str, Any] = {
            "layer_errors": layer_errors(self.teacher, student, self.texts[0].tokens[:1]),
            "texts": {text.name: self._compared(student, text) for text in self.texts},
            "recall": self._recall(student),
        }
        if self.prompt:
            found["answer"] = self._answered(student)
        return found

    def _compared(self, student: LanguageModel, text: Text) -> dict[str, Any]:
        tokens, expected = text.tokens, self._hidden[text.name]
        came = hidden_states(student, tokens)
        divergence, same = agreement(self.teacher, expected, student, came)
        by_model = {"teacher": self._surprise[text.name], "student": surprise(student, came, tokens)}
        for part in PARTS:
            with switched_off(student, part) as found:
                if found:
                    by_model[f"student, {part} off"] = surprise(student, hidden_states(student, tokens), tokens)
        return {
            "tokens": tokens.numel(),
            "perplexity": {name: perplexity(each) for name, each in by_model.items()},
            "kl_to_teacher": divergence,
            "top1_agreement": same,
            "by_position": by_position(by_model),
        }

    def _recall(self, student: LanguageModel) -> dict[str, Any] | None:
        """A passage of random tokens comes again beyond every layer's window: how likely it is, once and again."""
        far = seen_by(student)
        rows = self.texts[0].tokens[:PASSAGES]
        tokens = repeated_passages(rows, PASSAGE, first=far.sinks, least_between=far.window + PASSAGE)
        if tokens is None:
            return None
        # The first token of a passage is foretold by nothing.
        answers = PASSAGE - 1
        found: dict[str, Any] = {"tokens_between": tokens.shape[1] - PASSAGE - far.sinks}
        found |= {
            name: recall(model, tokens, answers) for name, model in (("teacher", self.teacher), ("student", student))
        }
        for part in PARTS:
            with switched_off(student, part) as any_left:
                if any_left:
                    found[f"student, {part} off"] = recall(student, tokens, answers)
        return found

    def _asked(self, model: LanguageModel) -> list[int]:
        if not self.prompt:
            return []
        prompt = torch.tensor([self.tokenizer(self.prompt)["input_ids"]], dtype=torch.int64)
        return generate(model, prompt, max_new_tokens=ANSWER, temperature=0.0)[0].tolist()

    def _answered(self, student: LanguageModel) -> dict[str, Any]:
        answer = self._asked(student)
        differing = [a != b for a, b in zip(answer, self._answer, strict=True)]
        return {
            "prompt": self.prompt,
            "teacher": self.tokenizer.decode(self._answer),
            "student": self.tokenizer.decode(answer),
            "tokens_alike": differing.index(True) if any(differing) else len(differing),
        }


@torch.no_grad()
def layer_errors(teacher: LanguageModel, student: LanguageModel, tokens: Tensor) -> list[float]:
    """Of each layer's mixer, on what its teacher's layer is given for `tokens: int64 [B,T]`.

    `|student - teacher| / |teacher|` in Frobenius norms over all tokens; 0 for a layer that is its teacher's.
    """
    x, errors = teacher.embedding(tokens), []
    layers: Any = zip(teacher.blocks, student.blocks, strict=True)
    for theirs, mine in layers:
        expected, _ = theirs.mixer(theirs.mixer_norm(x))
        came, _ = mine.mixer(mine.mixer_norm(x))
        errors.append(relative_error(came, expected))
        x = x + expected
        x = x + theirs.mlp(theirs.mlp_norm(x))
    return errors


@torch.no_grad()
def start_checks(teacher: LanguageModel, student: LanguageModel, tokens: Tensor) -> list[dict[str, Any]]:
    """Whether an untrained student is its teacher as long as it sees all of `tokens: int64 [B,T]`."""
    near = tokens[:, : _identical_for(student)]
    if near.shape[1] < 2:
        return []
    expected, came = (model(near, all_logits=True)[0] for model in (teacher, student))
    error, dtype = relative_error(came, expected), student.embedding.weight.dtype
    return [check(f"at the start, the first {near.shape[1]} tokens are the teacher's", error, IDENTITY[dtype])]


@torch.no_grad()
def end_checks(student: LanguageModel, tokens: Tensor) -> list[dict[str, Any]]:
    """Whether a student, trained or not, computes the same in every form, in constant memory. `tokens: int64 [B,T]`."""
    error, dtype = _recurrence(student, tokens), student.embedding.weight.dtype
    found = [check("a prompt in pieces, then token by token, equals the whole", error, AGREEMENT[dtype])]
    if all(block.mixer.constant_state for block in student.blocks):  # type: ignore[union-attr]
        grown = student.state_bytes(CACHE_LENGTHS[-1]) - student.state_bytes(CACHE_LENGTHS[0])
        found.append(check("bytes the state grows between 1k and 64k tokens", float(grown), 0.0))
    return found


def gap_closed(start: dict[str, Any], end: dict[str, Any]) -> dict[str, float | None]:
    """What part of the perplexity that the start had more than its teacher training took back, for each text.

    The start is the better one of the whole and of window and sinks alone. None where there is no gap.
    """
    closed: dict[str, float | None] = {}
    for name, text in start["texts"].items():
        before, after = text["perplexity"], end["texts"][name]["perplexity"]
        first = min(before["student"], before.get("student, memory off", before["student"]))
        gap = first - before["teacher"]
        closed[name] = (first - after["student"]) / gap if gap > 0 else None
    return closed


def goals(start: dict[str, Any], end: dict[str, Any], wish: VerifyConfig) -> list[dict[str, Any]]:
    """What training was to reach, as checks, of two `Judge.measure`s; none where `wish.gap_closed` is 0."""
    if not wish.gap_closed:
        return []
    pairs = zip(start["layer_errors"], end["layer_errors"], strict=True)
    worst = max((after / before for before, after in pairs if before > IDENTITY[torch.float32]), default=0.0)
    found = [check("a layer's error, at most, over what it was at the start", worst, SMALLER)]
    for name, closed in gap_closed(start, end).items():
        left = 0.0 if closed is None else 1 - closed
        found.append(check(f"{name}: part of the gap to the teacher that is left", left, 1 - wish.gap_closed))
        perplexities = end["texts"][name]["perplexity"]
        if "student, memory off" in perplexities:
            ratio = perplexities["student"] / perplexities["student, memory off"]
            found.append(check(f"{name}: perplexity with the memory over that without", ratio, SMALLER))
    if "answer" in end:
        other = float(end["answer"]["tokens_alike"] == 0)
        found.append(check("answers that begin otherwise than the teacher's", other, 0.0))
    return found


def check_generation(rows: Sequence[dict[str, int]], *, constant: bool) -> list[dict[str, Any]]:
    """Whether the cache of `export.long_generation` stayed as large as it was; where it must, being `constant`."""
    if not constant:
        return []
    grown = float(max(row["bytes"] for row in rows) - rows[0]["bytes"])
    return [check(f"bytes the cache grew by over {rows[-1]['tokens']} generated tokens", grown, 0.0)]


def check(name: str, error: float, limit: float) -> dict[str, Any]:
    """A named check with its outcome: passed where `error` is at most `limit`."""
    return {"name": name, "error": error, "limit": limit, "passed": error <= limit}


def _identical_for(student: LanguageModel) -> int:
    """Tokens for which every layer sees what its teacher's saw; 0 where some never promise it."""
    mixers = converted_mixers(student)
    if any(_of_its_own(mixer) for mixer in mixers):
        return 0
    return min((mixer.config.window for mixer in mixers), default=0)


def _of_its_own(mixer: Converted) -> bool:
    """Whether it is no softmax attention even where it sees everything."""
    return isinstance(mixer, Liger) or (isinstance(mixer, LinearizedAttention) and mixer.config.combine == "norms")


def _recurrence(student: LanguageModel, tokens: Tensor) -> float:
    """Error of the last logits of a prompt given in two pieces and eight steps, against the whole at once."""
    tokens = tokens[:1, :200]
    length = tokens.shape[1]
    steps = min(8, length - 1)
    first = max((length - steps) * 2 // 3, 1)
    whole = student(tokens, all_logits=True)[0][:, -steps:]
    _, state = student(tokens[:, :first])
    if first < length - steps:
        _, state = student(tokens[:, first : length - steps], state=state)
    outs = []
    for step in range(length - steps, length):
        logits, state = student.step(tokens[:, step], state)
        outs.append(logits)
    return relative_error(torch.stack(outs, 1), whole)


def cache_bytes(teacher: LanguageModel, student: LanguageModel) -> list[dict[str, int]]:
    """Bytes of one sequence's cache in float32, by its length."""
    return [
        {"tokens": length, "teacher": teacher.state_bytes(length), "student": student.state_bytes(length)}
        for length in CACHE_LENGTHS
    ]
