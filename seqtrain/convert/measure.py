"""What a converted model is worth against its teacher: perplexity, divergence, recall, each layer's error, ablations.

All logits of a text never exist at one time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.convert.architecture import layers_alone
from seqtrain.convert.settings import VerifyConfig
from seqtrain.errors import ConfigError
from seqtrain.mixers.common.liger import Liger
from seqtrain.mixers.linearized_attention import LinearizedAttention
from seqtrain.mixers.streaming_attention import StreamingAttention
from seqtrain.models import LanguageModel, generate
from seqtrain.models.architecture import Architecture
from seqtrain.models.pretrained import load_weights
from seqtrain.models.source import Source, open_source
from seqtrain.testing import relative_error
from seqtrain.validation import FilePath

Part = Literal["memory", "window"]
PARTS: tuple[Part, ...] = ("memory", "window")
# Tokens whose logits exist at one time.
CHUNK = 256
# The largest logarithm of a perplexity that is written: beyond it a float overflows.
LARGEST = 700.0
# Tokens of the answer to the prompt.
ANSWER = 8
# Tokens of a passage that is repeated, texts it is put into, tokens of it that what came before predicts.
PASSAGE, PASSAGES = 16, 4
ANSWERS = PASSAGE - 1

Converted = Liger | LinearizedAttention | StreamingAttention


def converted_mixers(model: LanguageModel) -> list[Converted]:
    """The mixers that replaced attention."""
    return [block.mixer for block in model.blocks if isinstance(block.mixer, Converted)]


def sinks_of(model: LanguageModel) -> int:
    """First tokens of a document that a converted layer's softmax always sees, at most."""
    sinks = [mixer.config.sinks for mixer in converted_mixers(model) if not isinstance(mixer, Liger)]
    return max(sinks, default=0)


def without_parts(student: LanguageModel) -> Iterator[str]:
    """What the student without its memory, and without its window, is called, while it is without, if it has both."""
    for part in PARTS:
        with switched_off(student, part) as found:
            if found:
                yield f"student, {part} off"


@contextmanager
def switched_off(model: LanguageModel, part: Part) -> Iterator[bool]:
    """`model` without the `memory` or the `window` of its converted layers; yields whether it has both."""
    mixers = converted_mixers(model)
    holders: dict[Part, list[Converted]] = {
        "memory": [mixer for mixer in mixers if not isinstance(mixer, StreamingAttention)],
        "window": [mixer for mixer in mixers if mixer.config.window],
    }
    found = holders[part] if all(holders.values()) else []
    for mixer in found:
        mixer.without = part
    try:
        yield bool(found)
    finally:
        for mixer in found:
            mixer.without = ""


@torch.no_grad()
def hidden_states(model: LanguageModel, tokens: Tensor) -> Tensor:
    """What the head is given for `tokens: int64 [B,T]`, a row at a time: `[B,T,D]`."""
    return torch.cat([model.hidden(row, keep_state=False)[0] for row in tokens.split(1)])


@torch.no_grad()
def surprise(model: LanguageModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """`-log p` of every token but the first given those before it, float64 `[B,T-1]`."""
    chunks = [
        log_p.gather(-1, part[..., None])[..., 0]
        for log_p, part in zip(_log_p(model, hidden[:, :-1]), tokens[:, 1:].split(CHUNK, 1), strict=True)
    ]
    return -torch.cat(chunks, 1).double()


@torch.no_grad()
def agreement(teacher: LanguageModel, expected: Tensor, student: LanguageModel, came: Tensor) -> tuple[float, float]:
    """Mean `KL(teacher | student)` in nats per token, and how often the likeliest token agrees, of `[B,T,D]`."""
    divergence, same = [], []
    for log_p, log_q in zip(_log_p(teacher, expected), _log_p(student, came), strict=True):
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
    return float(torch.cat(divergence, 1).mean()), float(torch.cat(same, 1).mean())


def _log_p(model: LanguageModel, hidden: Tensor) -> Iterator[Tensor]:
    """Logarithms of next tokens' probabilities, float32 `[B,<=CHUNK,vocab]` one after the other."""
    return (model.head(part).log_softmax(-1) for part in hidden.split(CHUNK, 1))


def perplexity(surprises: Tensor) -> float:
    """Of tokens with these surprises, in nats."""
    return math.exp(min(float(surprises.mean()), LARGEST))


def by_position(surprises: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Perplexity of each model between positions that double: `{"from": 64, "to": 128, "teacher": ..., ...}`.

    `surprises`: `[B,T-1]` by the model's name, the first of token 1.
    """
    length, rows, start = next(iter(surprises.values())).shape[1] + 1, [], 1
    while start < length:
        end = min(length, 64 if start == 1 else 2 * start)
        found = {name: perplexity(each[:, start - 1 : end - 1]) for name, each in surprises.items()}
        rows.append({"from": start, "to": end, **found})
        start = end
    return rows


def repeated_passages(tokens: Tensor, passage: int, first: int, between: int, *, rows: int) -> Tensor | None:
    """Rows of `tokens: [B,T]`, one after the other, each with a random passage of its tokens at `first` and at its end.

    `passage`: its length. `between`: how far back it first was. `rows`: at most so many; None where there is not one.
    """
    length = first + between + passage
    rows = min(rows, tokens.numel() // length)
    if not rows:
        return None
    tokens = tokens.flatten()[: rows * length].view(rows, length)
    # Of tokens that the model knows, in an unpredictable order.
    known = tokens.unique()
    drawn = torch.randint(len(known), (tokens.shape[0], passage), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, first : first + passage] = changed[:, length - passage :] = known[drawn]
    return changed


def passages(tokens: Tensor, sinks: int, distance: int) -> Tensor | None:
    """What recall from `distance` tokens back is asked with, of the rows of a text; None where it is too short."""
    return repeated_passages(tokens, PASSAGE, sinks, distance, rows=PASSAGES)


def recall(model: LanguageModel, tokens: Tensor, answers: int) -> dict[str, float]:
    """How well the last `answers` tokens of each row are predicted: mean surprise in nats, top-1 accuracy."""
    hidden = hidden_states(model, tokens)
    best = torch.cat([log_p.argmax(-1) for log_p in _log_p(model, hidden[:, -answers - 1 : -1])], 1)
    right = (best == tokens[:, -answers:]).double().mean()
    return {"surprise": float(surprise(model, hidden, tokens)[:, -answers:].mean()), "accuracy": float(right)}


@dataclass(frozen=True)
class Text:
    """`name`: what the report calls it. `origin`: where it is from, without a path. `tokens`: int64 `[B,T]`."""

    name: str
    origin: str
    tokens: Tensor


# What comes with Python: a module of its library, which `data=stdlib` holds out of what it trains on; its help pages.
BUILT_IN: Mapping[str, Callable[[], str]] = {
    "python-code": lambda: Path(str(import_module("multiprocessing.connection").__file__)).read_text(encoding="utf-8"),
    "python-prose": lambda: "\n".join(import_module("pydoc_data.topics").topics.values()),
}


def read_texts(config: VerifyConfig, source: Source, *, seed: int) -> list[Text]:
    """Those of `config.texts` as the source's tokenizer reads them; random tokens where it has none.

    Rows follow one another from the beginning of a text, as many as it has up to `config.sequences`. Raises
    `ConfigError`.
    """
    tokenizer = source.tokenizer()
    wanted = {name: origin for name, origin in config.texts.items() if origin}
    if tokenizer is not None and wanted:
        return [_tokenized(name, origin, config, tokenizer) for name, origin in wanted.items()]
    if files := [f"verify.texts.{name}={origin}" for name, origin in wanted.items() if origin not in BUILT_IN]:
        raise ConfigError(f"{files[0]}: source={source.path} has no tokenizer to read it with")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(source.config.vocab_size, (config.sequences, config.tokens), generator=generator)
    return [Text("random", "random tokens", tokens)]


@dataclass(frozen=True)
class ModelOnTexts:
    """Settings of a tool that tells the perplexity of a pretrained model."""

    # Folder of a Hugging Face checkpoint (safetensors), or a GGUF file.
    source: FilePath
    # Texts by name: a text file, or python-prose or python-code, which come with Python.
    texts: Mapping[str, FilePath] = field(default_factory=lambda: {"prose": "python-prose", "code": "python-code"})
    # Tokens of a text in one sequence.
    tokens: Annotated[int, Field(gt=1)] = 512
    # Sequences of a text at most.
    sequences: Annotated[int, Field(gt=0)] = 4

    def open(self, architecture_of: Callable[[Source, int], Architecture]) -> tuple[LanguageModel, list[Text]]:
        """The model in float32, for rows of `tokens`, and the texts. Raises as what reads them does."""
        source = open_source(self.source)
        verify = VerifyConfig(texts=self.texts, tokens=self.tokens, sequences=self.sequences)
        texts = read_texts(verify, source, seed=0)
        model = architecture_of(source, self.tokens).build()
        load_weights(model, source, dtype=torch.float32)
        return model.eval(), texts


def perplexities(model: LanguageModel, texts: Sequence[Text]) -> dict[str, float]:
    """Of each text, by its name."""
    return {text.name: perplexity(surprise(model, hidden_states(model, text.tokens), text.tokens)) for text in texts}


def _tokenized(name: str, origin: str, config: VerifyConfig, tokenizer: Any) -> Text:
    key = f"verify.texts.{name}={origin}"
    if origin in BUILT_IN:
        content = BUILT_IN[origin]()
    else:
        try:
            content = Path(origin).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{key}: no such file; give one, or {' or '.join(BUILT_IN)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}: can't be read as UTF-8 text: {error}") from None
    # Twelve characters are more than a token has on average: a long text need not be read to its end.
    content = content[: 12 * config.tokens * config.sequences]
    ids = torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    rows = min(len(ids) // config.tokens, config.sequences)
    if rows == 0:
        raise ConfigError(f"{key}: has {len(ids)} tokens, verify.tokens={config.tokens}; use fewer, or a longer text")
    return Text(name, Path(origin).name, ids[: rows * config.tokens].view(rows, config.tokens))


class Evaluator:
    """Measures students against a teacher, whose own results are computed once."""

    def __init__(
        self,
        teacher: LanguageModel,
        texts: Sequence[Text],
        *,
        tokenizer: Any = None,
        prompt: str = "",
        distances: Sequence[int] = (),
    ):
        """`tokenizer`: of Hugging Face, for the `prompt` both continue; without either there is no answer.

        `distances`: tokens back at which passages are asked for.
        """
        self.teacher = teacher
        self.texts = texts
        self.distances = distances
        self.tokenizer = tokenizer
        self.prompt = prompt if tokenizer is not None else ""
        self._hidden = {text.name: hidden_states(teacher, text.tokens) for text in texts}
        self._surprise = {text.name: surprise(teacher, self._hidden[text.name], text.tokens) for text in texts}
        self._answer = self._continued(teacher)

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
        for name in without_parts(student):
            by_model[name] = surprise(student, hidden_states(student, tokens), tokens)
        return {
            "tokens": tokens.numel(),
            "perplexity": {name: perplexity(each) for name, each in by_model.items()},
            "kl_to_teacher": divergence,
            "top1_agreement": same,
            "by_position": by_position(by_model),
        }

    def _recall(self, student: LanguageModel) -> list[dict[str, Any]]:
        """How well a passage of random tokens is predicted when it is repeated, for each distance that texts have.

        Nothing predicts its first token.
        """
        found = []
        for distance in self.distances:
            asked = passages(self.texts[0].tokens, sinks_of(student), distance)
            if asked is not None:
                models = {"teacher": recall(self.teacher, asked, ANSWERS), "student": recall(student, asked, ANSWERS)}
                models |= {name: recall(student, asked, ANSWERS) for name in without_parts(student)}
                found.append({"tokens_between": distance, **models})
        return found

    def _continued(self, model: LanguageModel) -> list[int]:
        if not self.prompt:
            return []
        prompt = torch.tensor([self.tokenizer(self.prompt)["input_ids"]], dtype=torch.int64)
        return generate(model, prompt, max_new_tokens=ANSWER, temperature=0.0)[0].tolist()

    def _answered(self, student: LanguageModel) -> dict[str, Any]:
        answer = self._continued(student)
        differing = [a != b for a, b in zip(answer, self._answer, strict=True)]
        return {
            "prompt": self.prompt,
            "teacher": self.tokenizer.decode(self._answer),
            "student": self.tokenizer.decode(answer),
            "tokens_alike": differing.index(True) if any(differing) else len(differing),
        }


@torch.no_grad()
def layer_errors(teacher: LanguageModel, student: LanguageModel, tokens: Tensor) -> list[float]:
    """The error of each layer's mixer on its teacher's input for `tokens: int64 [B,T]`.

    `|student - teacher| / |teacher|` in Frobenius norms over all tokens; 0 for a layer that is its teacher's.
    """
    mixers: Any = [block.mixer for block in student.blocks]
    layers = layers_alone(teacher, tokens, range(len(mixers)))
    return [relative_error(mixers[index](given)[0], expected) for index, given, expected in layers]
