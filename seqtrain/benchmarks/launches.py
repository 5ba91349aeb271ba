"""Times the Python around launches of the recurrences' Triton kernels, with launches that do nothing; needs no GPU.

    python tools/bench_launches.py                                   # all four forms
    python tools/bench_launches.py 'operators=[delta_rule]' rounds=9
    python tools/bench_launches.py documents=true cut=true           # packed documents; a row that is cut into pieces

CPU time of a call, forward, and forward with backward, on CPU tensors so small that what PyTorch does with their
numbers takes next to nothing: checks, the autograd function, memory for results, the search for a compiled kernel.
Triton's own search, which each first launch of a kind makes, and launches themselves are left out: `launches` says how
many a call makes. What is found once for all calls of a shape is found before the clock starts. The least of rounds, in
microseconds: what others do on a shared machine only adds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain import report
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.kernels import OPERATORS, dispatch, gpu

Name = Literal["delta_rule", "linear_attention"]


@dataclass(frozen=True)
class Settings:
    operators: Annotated[list[Name], Field(min_length=1)] = field(
        default_factory=lambda: ["delta_rule", "linear_attention"]
    )
    # Packed documents, by boundaries, in place of a row.
    documents: bool = False
    # A row that is cut into pieces.
    cut: bool = False
    # Rounds, of which the least counts, and calls in each.
    rounds: Annotated[int, Field(ge=1)] = 7
    calls: Annotated[int, Field(ge=1)] = 200
    # Folder for the results.
    output_dir: str = "outputs/bench_launches"


class _Launched:
    """A compiled kernel whose launches do nothing but count."""

    count = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        _Launched.count += 1


@contextmanager
def without_launches() -> Iterator[None]:
    """Inside, Triton kernels take CPU tensors as if they were an H100's, and do nothing."""
    from triton.runtime.jit import JITFunction

    from seqtrain.kernels.inspect.targets import use_target

    stock = JITFunction.run

    def run(self: Any, *arguments: Any, **options: Any) -> _Launched:
        _Launched.count += 1
        return _Launched()

    use_target("sm_90")
    gpu.DEVICES.add("cpu")
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = stock
        gpu.DEVICES.discard("cpu")
        dispatch.reset_backend_choice()


@dataclass(frozen=True)
class Row:
    """Microseconds of a call, forward, and forward with backward; and launches of both."""

    operator: str
    decay: str
    forward: float
    both: float
    launches: tuple[int, int]


def measure(name: str, decay: str, settings: Settings) -> Row:
    """One form's row; inside `without_launches`."""
    tokens, heads, width = (4096, 1, 16) if settings.cut else (64, 2, 16)
    shapes = {"q": width, "k": width, "v": width} | ({"beta": 0} if name == "delta_rule" else {})
    tensors = [torch.zeros(1, tokens, heads, *[x] * (x > 0)).bfloat16().requires_grad_() for x in shapes.values()]
    dims = {"none": None, "per token": (1, tokens, heads), "per channel": (1, tokens, heads, width)}[decay]
    log_decay = None if dims is None else torch.zeros(dims).requires_grad_()
    ends = torch.tensor([0, 20, 64], dtype=torch.int32) if settings.documents else None
    operator = OPERATORS[name]

    def forward() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = operator(*tensors, log_decay, cu_seqlens=ends, backend="triton")
        return found

    leaves = [x for x in (*tensors, log_decay) if x is not None]
    gradient = torch.zeros_like(tensors[2])

    def both() -> None:
        torch.autograd.grad(forward()[0], leaves, gradient)

    counts, times = [], []
    for call in (forward, both):
        call()
        before = _Launched.count
        call()
        counts.append(_Launched.count - before)
        times.append(min(_time(call, settings.calls) for _ in range(settings.rounds)))
    return Row(name, decay, times[0], times[1], (counts[0], counts[1]))


def _time(call: Callable[[], Any], calls: int) -> float:
    """Microseconds of this thread's CPU time."""
    before = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - before) / calls * 1e6


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if settings.documents and settings.cut:
        raise ConfigError("documents=true and cut=true: only a row is cut here; choose one of them")
    if reason := gpu.unavailable():
        raise ConfigError(f"bench-launches {reason}")
    # Backward on this thread, whose time is taken.
    torch.autograd.set_multithreading_enabled(False)
    with without_launches():
        rows = [measure(name, x, settings) for name in settings.operators for x in ("none", "per token", "per channel")]
    cells = [
        (x.operator, x.decay, f"{x.forward:.0f}", f"{x.both:.0f}", f"{x.launches[0]} + {x.launches[1] - x.launches[0]}")
        for x in rows
    ]
    report.show_table(("", "decay", "forward, us", "+ backward", "launches"), cells)
    path = Path(settings.output_dir) / "bench_launches.json"
    report.write_results(path, settings, rows=list(map(asdict, rows)))
    print(path)
    return 0
