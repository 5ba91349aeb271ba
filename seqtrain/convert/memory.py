"""What a rank holds in a stage of a recipe, counted before it runs: its shares of weights, and what its code makes.

The code is the stage's own, run forward and backward on tensors that have shapes and no values: what it keeps is seen,
not assumed.
"""

from typing import Any

import torch

from seqtrain.convert.tasks import Distillation, Transfer
from seqtrain.planning.trace import Tracer
from seqtrain.runtime.settings import PretrainConfig, micro_batch
from seqtrain.runtime.zero import stage_3_sizes

FLOAT = 4


def held_bytes(task: Transfer | Distillation, config: PretrainConfig) -> dict[str, float]:
    """Bytes of one rank between steps, by kind, in the layout that `config.parallel` says.

    `student`, `teacher`: weights. `gathered`: whole ones and gradients under way, under ZeRO 3.
    """
    model, *_ = task.model(config)
    parallel, frozen, trained = config.parallel, {"student": 0.0, "teacher": 0.0}, 0.0
    for name, weight in model.named_parameters():
        frozen["teacher" if name.startswith("teacher.") else "student"] += weight.nbytes
        trained += FLOAT * weight.numel() * weight.requires_grad
    stage, shards = parallel.zero_stage, parallel.shard_ranks
    divided = shards if stage else 1
    found = {name: held / (shards if stage == 3 else 1) for name, held in frozen.items()}
    found["optimizer"] = trained / divided * (3 if stage in (1, 2) else 2)
    found["gradients"] = trained / (divided if stage >= 2 else 1)
    if stage == 3:
        sizes = stage_3_sizes(model, shards, one_group=False)
        found["gathered"] = float(FLOAT * (sizes["stage3_max_live_parameters"] + sizes["reduce_bucket_size"]))
    return found


def made_bytes(task: Transfer | Distillation, config: PretrainConfig) -> float:
    """Most bytes that a pass forward and backward makes at one time, each weight's gradient gone when it is whole."""
    model: Any = task.model(config)[0]
    tokens = torch.zeros(1, micro_batch(config) * config.train.sequence_length // config.parallel.sequence).long()
    tracer = Tracer()
    # Weights that ZeRO 3 gathers are rounded for one product, and not kept so.
    told = {"enabled": config.train.dtype != "float32", "cache_enabled": config.parallel.zero_stage < 3}
    autocast = torch.autocast("cpu", torch.bfloat16, **told)
    with tracer.filled(model) as filled, tracer, tracer.record() as both:
        for weight in filled.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
        with autocast:
            loss = filled(tokens, tokens)
        loss.backward()
    return float(both.peak)
