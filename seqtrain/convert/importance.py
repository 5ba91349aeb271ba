"""How much each layer's own attention matters: what restoring it alone gives back, and how sharply the loss curves."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from seqtrain.convert.measure import ANSWERS, agreement, hidden_states, passages, recall, sinks_of
from seqtrain.models import LanguageModel
from seqtrain.runtime.sharpness import hessian_product

# Random vectors that a trace is estimated from, and tokens of the loss they are taken on.
PROBES, PROBED = 2, 256
# What keeps a quotient of two gains from being decided by a denominator near nothing.
LITTLE = 1e-2


@torch.no_grad()
def restore_one_layer(
    student: LanguageModel, teacher: LanguageModel, tokens: Tensor, distance: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """What each layer's own attention gives back to the fully converted student, layer by layer.

    `kl`: by how much it lowers `KL(teacher | student)` on the first row of `tokens: int64 [B,T]`, nats per token.
    `recall`: by how much the surprise at a passage repeated `distance` tokens later, nats per token; left out where
    `tokens` are too few.
    """
    row = tokens[:1]
    expected, asked = hidden_states(teacher, row), passages(tokens, sinks_of(student), distance)

    def measured() -> dict[str, float]:
        found = {"kl": agreement(teacher, expected, student, hidden_states(student, row))[0]}
        return found if asked is None else found | {"recall": recall(student, asked, ANSWERS)["surprise"]}

    without = measured()
    scores: dict[str, list[float]] = {name: [] for name in without}
    for index, (mine, theirs) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        progress(f"layer {index}")
        replaced, mine.mixer = mine.mixer, theirs.mixer
        for name, value in measured().items():
            scores[name].append(without[name] - value)
        mine.mixer = replaced
    return scores


def hessian_traces(teacher: LanguageModel, tokens: Tensor, *, seed: int) -> list[float]:
    """The mean diagonal element of the loss's Hessian in the weights of each layer's attention.

    HAWQ-V2's measure (arXiv 1911.03852), by Hutchinson's estimate in float64 on the first row of `tokens: int64 [B,T]`.
    `teacher` is copied for it.
    """
    model = teacher_copy(teacher)
    row = tokens[:1, : PROBED + 1]
    layers = [list(block.mixer.parameters()) for block in model.blocks]
    weights = [weight.requires_grad_() for layer in layers for weight in layer]

    def loss() -> Tensor:
        summed: Tensor = model(row[:, :-1], row[:, 1:])
        return summed / (row.shape[1] - 1)

    product, generator = hessian_product(loss, weights), torch.Generator().manual_seed(seed)
    sizes = [sum(weight.numel() for weight in layer) for layer in layers]
    traces = torch.zeros(len(layers), dtype=torch.float64)
    for _ in range(PROBES):
        signs = torch.randint(2, (sum(sizes),), generator=generator).double() * 2 - 1
        parts = (signs * product(signs)).split(sizes)
        traces += torch.stack([part.mean() for part in parts]) / PROBES
    return traces.tolist()


def teacher_copy(teacher: LanguageModel) -> LanguageModel:
    """In float64, with weights of its own and none that requires a gradient."""
    with torch.device("meta"):
        model = LanguageModel(teacher.config, teacher.mixers, teacher.vocab_size)
    values = {name: value.detach().double() for name, value in teacher.state_dict().items()}
    model.load_state_dict(values, assign=True)
    return model.requires_grad_(False).eval()


def combined(scores: Mapping[str, Sequence[float]], wanted: str) -> list[float]:
    """The one score that `wanted` is made of: a name of `scores`, `both`, or `recall_per_kl`.

    `both`: KL and recall, each relative to its largest. `recall_per_kl`: the recall that a layer gives per divergence
    it removes, as HALO has it (arXiv 2601.22156). Without a measure of recall both are the KL.
    """
    if wanted in scores:
        return list(scores[wanted])
    kl, recalled = scores["kl"], scores.get("recall")
    if recalled is None:
        return list(kl)
    if wanted == "both":
        parts = [[value / max(max(each), 1e-12) for value in each] for each in (kl, recalled)]
        return [sum(pair) / 2 for pair in zip(*parts, strict=True)]
    return [max(r, 0.0) / (max(k, 0.0) + LITTLE) for k, r in zip(kl, recalled, strict=True)]


def rank_correlations(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Spearman's, of every two scores, as `kl, trace`."""
    names = list(scores)
    ranks = {name: torch.tensor(scores[name]).argsort().argsort().double() for name in names}
    return {
        f"{first}, {second}": float(torch.corrcoef(torch.stack([ranks[first], ranks[second]]))[0, 1])
        for number, first in enumerate(names)
        for second in names[number + 1 :]
        if len(scores[first]) > 1
    }
