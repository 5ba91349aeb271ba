"""What a run trains and who watches, apart from how: the training loop knows nothing of their purpose."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from seqtrain.data import (
    WHOLE_BATCH,
    Batch,
    BatchSlice,
    Corpus,
    HeldOutParts,
    Mixture,
    ShardIndex,
    SyntheticCorpus,
    Tokenizer,
    load_tokenizer,
    open_corpus,
)
from seqtrain.initialization import Fill
from seqtrain.runtime.optimizers import parameter_groups
from seqtrain.runtime.settings import PretrainConfig, micro_batch, unit
from seqtrain.runtime.source import build_model, first_weights, frozen_weights


class TrainingData(Protocol):
    """Batches that follow from their number alone, whoever reads them and in however many slices."""

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """As `seqtrain.data.Batches.at`."""
        ...


class HeldOut(TrainingData, Protocol):
    """What a model is scored on: so many batches."""

    def __len__(self) -> int: ...

    def text_bytes(self, batch: Batch) -> float:
        """Bytes of text that the labels of a batch stand for."""
        ...


@dataclass(frozen=True)
class Trainable:
    """What one rank trains.

    `model(tokens, labels, sequence=)` is the loss, a scalar summed over the labels that count. `groups`: the
    optimizer's, as `parameter_groups` makes them. `held_out`: what the model is scored on; None for no score.
    `to_verify`: shards to be verified meanwhile.
    `first_weights`: what a model on the meta device begins with; None for one that has its weights. `frozen`:
    names of weights that it always gives, for no checkpoint holds them. `epochs`: what a record says of how often the
    text has been read after so many batches. `sources`: names of those that `Batch.sources` counts. `tokenizer`: opens
    that of the text the model can continue; None where it learns none.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    batches: TrainingData
    held_out: HeldOut | HeldOutParts | None = None
    to_verify: Sequence[ShardIndex] = ()
    first_weights: Fill | None = None
    frozen: frozenset[str] = frozenset()
    epochs: Callable[[int], dict[str, float]] = lambda steps: {}
    sources: tuple[str, ...] = ()
    tokenizer: Callable[[], Tokenizer] | None = None


def shards_to_verify(opened: Corpus | SyntheticCorpus | Mixture) -> list[ShardIndex]:
    """What is too large to have been verified when it was opened, and is to be."""
    return [shards for text in opened.texts.values() for shards in text.to_verify]


class Task(Protocol):
    """What to train. Plain values only: it is sent to every rank, and each builds its own `Trainable`."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides, besides the config, which numbers come out; checkpoints made with other values are refused."""
        ...

    def build(self, config: PretrainConfig, corpus: Path) -> Trainable:
        """Builds the model and opens the corpus in the folder `corpus`; draws from torch's own generator."""
        ...


@dataclass(frozen=True)
class Pretraining:
    """A language model, new or of `config.source`, trained to predict the next token."""

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def build(self, config: PretrainConfig, corpus: Path) -> Trainable:
        opened = open_corpus(corpus, config.data)
        # Rows that carry a state on are one: no layout tears them apart, and no state outlives a micro-batch.
        carried = config.data.carry_rows
        length = config.train.sequence_length * carried
        model = build_model(config, opened.vocab_size)
        batches = opened.training_batches(
            seed=config.seed, sequence_length=length, batch_size=unit(config.train) // carried
        )
        return Trainable(
            model=model,
            frozen=frozen_weights(config, model),
            first_weights=first_weights(config, model),
            groups=parameter_groups(model.parameters(), config.optimizer.weight_decay),
            batches=batches,
            epochs=batches.epochs,
            sources=tuple(entry.name for entry in opened.entries) if isinstance(opened, Mixture) else (),
            held_out=opened.held_out_batches(
                sequence_length=length,
                batch_size=micro_batch(config) * config.parallel.data // carried,
                max_tokens=config.evaluation.max_tokens,
            ),
            to_verify=shards_to_verify(opened),
            tokenizer=None if isinstance(opened, SyntheticCorpus) else partial(load_tokenizer, config.data),
        )


# A whole step; within one, the reading of its batches; what comes between steps.
Phase = Literal["step", "data", "evaluation", "checkpoint"]


class Callback:
    """A callback that does nothing; base of the others. One is made before the ranks start and pickled to each."""

    def begin(self, state: Any) -> None:
        """Called with the rank's `TrainState` before its first step, on all ranks."""

    def phase(self, name: Phase) -> AbstractContextManager[Any]:
        """Entered before each of a rank's phases and left after it."""
        return nullcontext()

    def end(self) -> None:
        """Called after the last step of a run that wasn't stopped, when its checkpoint is written; on all ranks."""
