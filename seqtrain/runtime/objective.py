"""What a run trains, apart from how: the step loop is given it, and knows nothing of what it is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from seqtrain.data import WHOLE_BATCH, Batch, Share, held_out_batches, open_corpus, training_batches
from seqtrain.models import LanguageModel
from seqtrain.runtime.engine import parameter_groups
from seqtrain.runtime.settings import PretrainConfig, micro_batch


class TrainingData(Protocol):
    """Batches that follow from their number alone, whoever reads them and in however many pieces."""

    def at(self, index: int, share: Share = WHOLE_BATCH) -> Batch:
        """As `seqtrain.data.Batches.at`."""
        ...


class HeldOut(TrainingData, Protocol):
    """What a model is scored on: so many batches."""

    def __len__(self) -> int: ...


class NothingHeldOut:
    """No batches, and so no score."""

    def __len__(self) -> int:
        return 0

    def at(self, index: int, share: Share = WHOLE_BATCH) -> Batch:
        raise IndexError(index)


@dataclass(frozen=True)
class Work:
    """What one rank trains.

    `model(tokens, labels, sequence=)` is the loss, a scalar summed over the labels that count. `groups`: the
    optimizer's, as `parameter_groups` makes them. `held_out`: what the model is scored on.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    batches: TrainingData
    held_out: HeldOut


class Objective(Protocol):
    """What to train. Plain values only: it is sent to every rank, and each makes its own `Work` of it."""

    def trajectory(self) -> dict[str, Any]:
        """What decides, beside the config, which numbers come out; a checkpoint made with other values is refused."""
        ...

    def work(self, config: PretrainConfig, corpus: Path) -> Work:
        """Builds the model and opens the corpus in the folder `corpus`; draws from torch's own generator."""
        ...


@dataclass(frozen=True)
class Pretraining:
    """A new language model, trained to predict the next token."""

    def trajectory(self) -> dict[str, Any]:
        return {}

    def work(self, config: PretrainConfig, corpus: Path) -> Work:
        opened = open_corpus(corpus, config.data)
        model = LanguageModel(config.model, config.mixer, opened.vocab_size)
        return Work(
            model=model,
            groups=parameter_groups(model.parameters(), config.optimizer.weight_decay),
            batches=training_batches(
                opened,
                config.data,
                seed=config.seed,
                sequence_length=config.train.sequence_length,
                batch_size=config.train.batch_size,
            ),
            held_out=held_out_batches(
                opened,
                config.data,
                sequence_length=config.train.sequence_length,
                batch_size=micro_batch(config) * config.parallel.data,
                max_tokens=config.evaluation.max_tokens,
            ),
        )


PRETRAINING = Pretraining()
