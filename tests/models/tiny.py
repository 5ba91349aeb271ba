"""Tiny models of every mixer, and tokens for them."""

import torch

from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from tests.parallel.shard_cases import Cut

VOCAB = 40
# Fields that make a tiny layer show at these lengths what its default would not.
TINY = {
    "based": {"window": 30},
    "intra_hybrid": {"window": 30, "full": True},
    "linearized_attention": {"window": 30},
    "mamba2": {"state": 8},
    "mamba3": {"state": 8},
    "sliding_attention": {"window": 30},
    "tcnca": {"chunk": 32},
    "tensor_attention": {"key": 3},
    "trans_normer": {"block": 16},
}
HYBRIDS = {
    "recurrent": ("gated_delta_net", "mamba2", "s5", "gla", "tensor_attention"),
    "with attention": ("delta_net", "sliding_attention", "kda", "attention"),
}
LAYERS = {name: (name,) for name in MIXERS.names} | HYBRIDS


def build(
    layers: tuple[str, ...], *, seed: int = 3, settings: dict = TINY, dtype: torch.dtype = torch.float32, **fields
) -> LanguageModel:
    torch.manual_seed(seed)
    shape = {"depth": max(2, len(layers)), "width": 24, "heads": 2, "loss_chunk": 64} | fields
    mixers = {name: MIXERS.get(name).Config(**settings.get(name, {})) for name in layers}
    return LanguageModel(ModelConfig(layers=layers, **shape), mixers, VOCAB).to(dtype)


def assert_same_gradients(
    came: tuple, truth: tuple, limit: float = 1e-5, *, scale: float = 1.0, what: str = ""
) -> None:
    """Both hold a loss, and gradients by name, those that came `scale` times as large."""
    assert abs(came[0] - truth[0]) <= limit * abs(truth[0]), what
    largest = max(gradient.norm() for gradient in truth[1].values())
    for name, expected in truth[1].items():
        # A gradient that is zero but for rounding is held to the size of the others.
        error = (came[1][name] - scale * expected).norm()
        assert error < limit * scale * max(expected.norm(), 1e-2 * largest), f"{what} {name}"


def batch(tokens: int = 40, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the next ones as their labels."""
    ids = torch.randint(VOCAB, (rows, tokens + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:].clone()


def row(cut: Cut, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one of many rows, and labels of which the first ten don't count."""
    ids = torch.randint(VOCAB, (1, cut.tokens + 1), generator=torch.Generator().manual_seed(cut.tokens + number))
    labels = ids[:, 1:].clone()
    labels[:, :10] = -100
    return ids[:, :-1], labels
