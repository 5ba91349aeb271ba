"""The text at the end of a run, by the ranks that have trained, with the weights that they hold."""

from contextlib import nullcontext
from typing import Any

import torch

from seqtrain.runtime.generate import Continuation, continue_ids, prompt_ids, text_of
from seqtrain.runtime.step import TrainState


def sample(state: TrainState) -> str:
    """What the model continues `config.sample` with, as it will from the last checkpoint. A collective.

    All ranks but 0 get an empty text; all do where the model has learned none, or generates none.
    """
    config, ranks, opens = state.config, state.ranks, state.trainable.tokenizer
    if opens is None or not config.sample.tokens or config.model.kind == "encoder":
        return ""
    wish = Continuation(config.sample.prompt, config.sample.tokens, config.seed)
    tokenizer = opens() if ranks.first else None
    prompt, end = ranks.from_first((prompt_ids(tokenizer, wish), tokenizer.end) if tokenizer else None)
    # Graphs are made for rows of training, and their last digits are others.
    eager: Any = torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
    with eager, state.engine.as_saved() as model:
        ids = continue_ids(model, prompt, wish, end, config.kernels.backend, agree=ranks.copy_first)
    return text_of(tokenizer, wish, ids) if tokenizer else ""
