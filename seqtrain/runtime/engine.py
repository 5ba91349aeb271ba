"""The DeepSpeed engine: the environment it wants, its configuration, the optimizer inside it."""

import logging
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.settings import OptimizerConfig, PretrainConfig, micro_batch, segments

log = logging.getLogger("seqtrain.runtime")


class FiniteStep:
    """Mixed into an optimizer for ZeRO stage 0: clips, and leaves everything alone when a gradient isn't finite.

    ZeRO's own optimizers do both; the plain optimizer that DeepSpeed runs in stage 0 does neither in float32. The two
    public attributes are those the engine reads from ZeRO's optimizers.
    """

    param_groups: list[dict[str, Any]]
    # Largest norm of the gradient; 0 doesn't clip.
    clipping = 0.0
    # Whether the last step was left out.
    overflow = False
    # Norm of the last gradient, before clipping.
    _global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in weights])
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.clipping:
            nn.utils.clip_grads_with_norm_(weights, self.clipping, norm)
        super().step()  # type: ignore[misc]


def prepare_environment(ranks: Ranks) -> None:
    """Sets what DeepSpeed reads from the environment, before it is first imported in this process.

    Without the ranks' variables it looks for MPI; without an accelerator named it may take another than torch's; its
    shared-memory collective would be compiled at the first start.
    """
    os.environ["DS_ACCELERATOR"] = ranks.device.type
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    os.environ.setdefault("WORLD_SIZE", str(ranks.count))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    warnings.filterwarnings("ignore", module="deepspeed")
    # DeepSpeed calls what this torch has renamed; nothing the user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Reading the table would make DeepSpeed try a compiler on every operator it has.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def build_engine(model: nn.Module, groups: list[dict[str, Any]], config: PretrainConfig, ranks: Ranks) -> Any:
    """`model` inside a DeepSpeed engine that knows the optimizer, the ZeRO stage, clipping and accumulation.

    `groups`: the parameters to train, as `parameter_groups` gives them.
    """
    prepare_environment(ranks)
    import deepspeed

    model.to(ranks.device)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(groups, config),
        config=_deepspeed_config(config, ranks.device),
        dist_init_required=False,
    )
    log.info(
        "engine: DeepSpeed %s, ZeRO %d, %s over %d x %d ranks (data x sequence, %s), optimizer %s of %s",
        deepspeed.__version__,
        config.parallel.zero_stage,
        config.train.dtype,
        config.parallel.data,
        config.parallel.sequence,
        ranks.device.type,
        config.optimizer.name,
        config.optimizer.implementation,
    )
    return engine


def micro_batches(config: PretrainConfig) -> int:
    """How many batches go through the model one after the other in a step: steps of gradient accumulation."""
    return config.train.batch_size // (config.parallel.data * micro_batch(config))


def _deepspeed_config(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    stage, pieces = config.parallel.zero_stage, segments(config)
    return {
        # A segment counts as a micro-batch: each has a backward pass of its own.
        "train_batch_size": pieces * config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch(config),
        "gradient_accumulation_steps": pieces * micro_batches(config),
        # Ranks to an entry of the batch, for DeepSpeed's arithmetic of batches. All else there is over all ranks alike:
        # with its own mesh, gradients would stay unreduced over the ranks of a sequence in stages 0 to 2.
        "sequence_parallel_size": config.parallel.sequence,
        # In stage 0 the optimizer clips, see FiniteStep.
        "gradient_clipping": config.train.gradient_clipping if stage else 0.0,
        "zero_optimization": {"stage": stage, "overlap_comm": device.type == "cuda"},
        "zero_allow_untested_optimizer": True,
        # Not `bf16.enabled`, which would round every weight, the gates' decays too, before it makes its float32 copy.
        # No module is "safe" for lower precision, so that gradients and gathered weights travel in float32.
        "torch_autocast": {
            "enabled": config.train.dtype != "float32",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": None,
    }


def _optimizer(groups: list[dict[str, Any]], config: PretrainConfig) -> torch.optim.Optimizer:
    cls = _optimizer_class(config.optimizer)
    if config.parallel.zero_stage == 0:
        cls = type(f"Finite{cls.__name__}", (FiniteStep, cls), {"clipping": config.train.gradient_clipping})
    options = config.optimizer
    return cls(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def _optimizer_class(options: OptimizerConfig) -> Any:
    if options.implementation == "torch":
        return torch.optim.AdamW
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, *, rate: float = 1.0
) -> list[dict[str, Any]]:
    """Those that are trained as two groups: matrices decay; vectors and scalars (norms, gates, biases) do not.

    `rate`: a factor on the run's learning rate.
    """
    weights = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": weight_decay, "rate": rate},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0, "rate": rate},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def backward(engine: Any, loss_sum: Tensor, *, weight: float) -> None:
    """Adds the gradients of `loss_sum` (a scalar, summed over tokens) times `weight`.

    DeepSpeed divides by the number of micro-batches and averages over all ranks, those of one sequence too, so
    `weight` is `ranks * backward passes of a step / tokens of the whole batch`. A loss that isn't finite makes every
    gradient NaN: so one test, the norm of the reduced gradient, finds both and comes out alike on all ranks.
    """
    # On one thread, where autograd would take one for each kind of device: gradients then come in the same order on
    # every rank, however long it waits for its neighbours' states, and DeepSpeed reduces them by order of arrival.
    with torch.autograd.set_multithreading_enabled(False):
        engine.backward(loss_sum * torch.where(loss_sum.detach().isfinite(), weight, torch.nan))


def last_step(engine: Any) -> tuple[float, bool]:
    """The gradient's norm before clipping in the step just made, and whether the step was taken.

    A step whose gradient isn't finite on any rank is left out on all of them: weights, moments and step count stay.
    """
    if engine.optimizer.overflow:
        return float("nan"), False
    return float(engine.get_global_grad_norm()), True
