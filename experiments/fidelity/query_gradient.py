"""Gradients of queries as inputs grow: bounded by a norm, not by dividing by the weights' sum (arXiv 2210.10340)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.fidelity.results import Axes, Bounds, Effort, Figure, Row, seed_curves
from experiments.fidelity.training import mixer_config
from seqtrain.mixers import MIXERS, LayerShape, Mixer

TOKENS, WIDTH, HEADS = 256, 64, 4
SCALES = (1.0, 3.0, 10.0, 30.0, 100.0)
CONTENDERS: tuple[tuple[str, dict[str, Any], Bounds], ...] = (
    ("trans_normer", {"diag_share": 0.0}, Bounds(at_most=2.0)),
    ("linear_attention", {}, Bounds(at_least=10.0)),
)


def measure(effort: Effort) -> Iterator[Figure]:
    """The largest gradient at inputs 100 times as large, over that at normal ones."""
    for name, fields, bounds in CONTENDERS:
        rows = []
        for seed in effort.seeds:
            torch.manual_seed(seed)
            mixer = MIXERS.get(name)(mixer_config(name, fields), LayerShape(WIDTH, HEADS)).double()
            x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
            rows.append([largest_query_gradient(mixer, scale * x) for scale in SCALES])
        yield Figure(
            what=f"{name}: largest query gradient, inputs x 100 over inputs x 1",
            values=tuple(row[-1] / row[0] for row in rows),
            length=TOKENS,
            curves=seed_curves(name, effort.seeds, SCALES, rows),
            bounds=bounds,
        )


def largest_query_gradient(mixer: Mixer, x: Tensor) -> float:
    """The largest norm, over tokens and heads, of the gradient that reaches a query before its feature map.

    `x: [B,T,D]`. What is differentiated is the mean over channels, with random signs, of what goes into the output
    projection at the query's own token. The mixer makes queries with a module `qkv` that gives `((q, k, v), state)`.
    """
    kept: dict[str, Tensor] = {}

    def keep_queries(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        (q, k, v), state = output
        kept["q"] = q.detach().requires_grad_()
        return (kept["q"], k, v), state

    def keep_output(module: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        kept["out"] = arguments[0]

    assert isinstance(mixer.qkv, torch.nn.Module)
    hooks = [mixer.qkv.register_forward_hook(keep_queries), mixer.out.register_forward_pre_hook(keep_output)]
    try:
        mixer(x)
    finally:
        for hook in hooks:
            hook.remove()
    out = kept["out"]
    signs = torch.randint(2, out.shape, generator=torch.Generator().manual_seed(0)).to(out) * 2 - 1
    # A query changes nothing but its own token's output: one backward pass gives all of them.
    [gradient] = torch.autograd.grad((out * signs).sum() / out.shape[-1], kept["q"])
    return gradient.norm(dim=-1).max().item()


ROW = Row(
    name="query_gradient",
    claim="TransNormer's largest query gradient stays bounded as the scale of the input grows 100-fold, that of the "
    "scaled form, linear attention over the sum of its weights, does not (arXiv 2210.10340)",
    method=f"one layer at its initial weights, width {WIDTH}, {HEADS} heads, {TOKENS} random tokens. Values grow with "
    "the input: the scaled form passes that on to the queries' gradients. Bounded is taken as at most twice, unbounded "
    "as at least ten times",
    axes=Axes("scale of the input", "largest query gradient", log_x=True, log_y=True),
    measure=measure,
    sources=("2210.10340",),
)
