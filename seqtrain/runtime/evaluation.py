"""The score on held-out text."""

import math
from typing import Any

import torch

from seqtrain.data import EvaluationBatches, TokenStream
from seqtrain.parallel.sequence import Sequence
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.settings import PretrainConfig, micro_batch
from seqtrain.runtime.signals import StopRequest


def held_out_batches(config: PretrainConfig, stream: TokenStream, ranks: Ranks) -> EvaluationBatches:
    """The held-out text in batches of one micro-batch a rank, as many as `evaluation.max_tokens` asks for."""
    return EvaluationBatches(
        stream,
        sequence_length=config.train.sequence_length,
        batch_size=micro_batch(config) * ranks.count,
        reset_at_documents=config.data.reset_at_documents,
        limit=math.ceil(config.evaluation.max_tokens / config.train.sequence_length),
    )


@torch.no_grad()
def bits_per_byte(
    engine: Any, batches: EvaluationBatches, ranks: Ranks, stop: StopRequest, *, backend: str
) -> float | None:
    """Bits the model needs for a byte of the held-out text, given the text before it in the same window.

    All ranks call it. None when the run was asked to stop meanwhile, or when nothing is held out.
    """
    engine.eval()
    nats = size = 0.0
    try:
        for index in range(len(batches)):
            batch = batches.at(index, rank=ranks.rank, ranks=ranks.count)
            loss_sum = engine(
                batch.tokens.to(ranks.device),
                batch.labels.to(ranks.device),
                sequence=Sequence(cu_seqlens=batch.cu_seqlens, backend=backend),
            )
            loss, read, stopping = ranks.sum(loss_sum.item(), batch.bytes, stop.requested())
            nats, size = nats + loss, size + read
            if stopping:
                return None
    finally:
        engine.train()
    return nats / math.log(2) / size if size else None
