"""Compares whole training steps with those of transformers' own models at equal weights, in turns, in one process.

    python tools/bench_training.py                                       # three families, 512 to 32,768 tokens
    python tools/bench_training.py 'families=[qwen3_next]' 'tokens=[2048,8192]' rounds=5
    python tools/bench_training.py 'families=[mamba2,nemotron_h,falcon_h1]' tokens=8192 vocab=4096 dtype=float32

Each family's model is made by transformers with `depth` layers of width `width`, saved, and read by
`seqtrain.models.from_pretrained`; both take the loss of the same row and its gradients. In bfloat16 both keep float32
weights and multiply under PyTorch's autocast. Every round times each side once. Printed are medians of CPU time, wall
time, how many times transformers' CPU time ours is, the most memory a step held beyond weights and gradients (in a step
that is not timed), and the share of the GEMM rate: the dense products and operators of the model's definition, forward
and backward, over our CPU time, as a part of the rate of matrix products alone, measured in the same rounds: all
products of the model's matrices, each at its own size, by each routine that PyTorch has (`ROUTINES` of
seqtrain/kernels/products.py), of which the fastest counts.
transformers runs on its own PyTorch path, with SDPA where it has it. With more than one thread, where others keep the
cores busy, threads that wait count as CPU time, too. A table, `bench_training.json` and a picture are left in
`output_dir`.
"""

import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from seqtrain import report
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.kernels import products
from seqtrain.memory import AnonymousPeak, give_back_free_memory
from seqtrain.models import from_pretrained
from seqtrain.models.language_model import Head

DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
MAMBA2 = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
# By `model_type`: what transformers calls its classes, and what of its config the common sizes do not say: the shape of
# a published model (of the smallest where they differ), brought to a width of 512.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "olmo_hybrid": ("OlmoHybrid", DELTA),
    # With an MLP where the published one has experts, which transformers runs one by one.
    "qwen3_next": ("Qwen3Next", {**DELTA, "num_experts": 0, "head_dim": 64}),
    "mamba": ("Mamba", {"state_size": 16}),
    "mamba2": ("Mamba2", {"num_heads": 16, "head_dim": 64, "state_size": 128, "n_groups": 1}),
    # Falcon-H1-0.5B: attention half as wide as the model.
    "falcon_h1": (
        "FalconH1",
        {
            **MAMBA2,
            "mamba_d_ssm": 768,
            "mamba_n_heads": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "intermediate_size": 1024,
        },
    ),
    "bamba": ("Bamba", MAMBA2),
    # Nemotron-H-8B: one layer in thirteen is attention, here one in eight.
    "nemotron_h": (
        "NemotronH",
        {
            "hybrid_override_pattern": "M-M-M*M-",
            "mamba_num_heads": 16,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 1,
            "head_dim": 64,
        },
    ),
}
OURS, THEIRS = "ours", "transformers"
# By how much losses of the two sides may differ.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
# Rows of the products whose rate is measured; of matrices with so many outputs, as the head, the loss takes fewer.
GEMM_ROWS, LOSS_ROWS, FEW_OUTPUTS = 8192, 1024, 8192
# A list, for which its only entry may stand.
LISTED = (Field(min_length=1), BeforeValidator(lambda values: tuple(values) if isinstance(values, list) else (values,)))
TABLE = report.LiveTable(
    {
        "family": "<12",
        "dtype": "<8",
        "tokens": "7,d",
        "CPU s": "8.2f",
        "wall s": "8.2f",
        "HF CPU s": "9.2f",
        "ratio": "6.2f",
        "of GEMM": "8.2f",
        "MiB": "7,.0f",
        "HF MiB": "8,.0f",
    }
)


@dataclass(frozen=True)
class Settings:
    # Families that are compared.
    families: Annotated[tuple[str, ...], *LISTED] = ("qwen3_next", "mamba2", "llama")
    # Lengths of the row.
    tokens: Annotated[tuple[Annotated[int, Field(gt=1)], ...], *LISTED] = (512, 2048, 8192, 32768)
    # Number formats of the products.
    dtype: Annotated[tuple[Literal["float32", "bfloat16"], ...], *LISTED] = ("float32", "bfloat16")
    # Channels of the residual stream.
    width: Annotated[int, Field(gt=0)] = 512
    # Layers.
    depth: Annotated[int, Field(gt=0)] = 8
    # Rows of embedding and head.
    vocab: Annotated[int, Field(gt=0)] = 16384
    # Threads of both; 0: as many as there are cores.
    threads: Annotated[int, Field(ge=0)] = 1
    # Times each side takes the step, in turns.
    rounds: Annotated[int, Field(gt=0)] = 3
    # Seconds of a step above which a side is left out of longer rows.
    seconds: Annotated[float, Field(gt=0)] = 120.0
    output_dir: str = "outputs/bench_training"


@dataclass(frozen=True)
class Taken:
    """Seconds that a step took, and its loss."""

    cpu: float
    wall: float
    loss: float


Step = Callable[[], Tensor]


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    for name in settings.families:
        if name not in FAMILIES:
            raise ConfigError("families: " + unknown_name("family", name, FAMILIES))
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    about = report.machine() | {"transformers": transformers.__version__}
    print(report.in_a_line(about), flush=True)
    print(TABLE.header, flush=True)
    rows: list[dict[str, Any]] = []
    for name in settings.families:
        sides = both(name, settings)
        for dtype in settings.dtype:
            left = {OURS, THEIRS}
            for tokens in sorted(settings.tokens):
                row = compared(name, sides, tokens, dtype, settings, left)
                rows.append(row)
                print(line(row), flush=True)
                left = {side for side in left if fits(row, side, tokens, settings)}
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_results(folder / "bench_training.json", settings, about=about, rows=rows)
    draw(rows, report.in_a_line(about), folder / "bench_training.png")
    print(f"\n{folder / 'bench_training.json'}, {folder / 'bench_training.png'}")
    return 0


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    ours, theirs = row["sides"].get(OURS, {}), row["sides"].get(THEIRS, {})

    def mebibytes(side: dict[str, Any]) -> float | None:
        return side["bytes"] / 2**20 if side else None

    times = ours.get("cpu"), ours.get("wall"), theirs.get("cpu"), row["ratio"], row["share"]
    return TABLE.row(row["family"], row["dtype"], row["tokens"], *times, mebibytes(ours), mebibytes(theirs))


def fits(row: dict[str, Any], side: str, tokens: int, settings: Settings) -> bool:
    """Whether a side is timed on the next longer row: it was fast enough, and what it held leaves room for that."""
    if side not in row["sides"]:
        return False
    longer = next((each for each in sorted(settings.tokens) if each > tokens), tokens)
    taken, there = row["sides"][side], psutil.virtual_memory().available
    return bool(taken["cpu"] <= settings.seconds and taken["bytes"] * longer / tokens < 0.8 * there)


def both(name: str, settings: Settings) -> tuple[Any, Any]:
    """Our model and transformers', with the same weights."""
    import transformers

    kind, own = FAMILIES[name]
    sizes = {"hidden_size": settings.width, "vocab_size": settings.vocab, "num_hidden_layers": settings.depth}
    sizes |= {"intermediate_size": 3 * settings.width, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"max_position_embeddings": max(settings.tokens)}
    if pattern := own.get("hybrid_override_pattern"):
        own = own | {"hybrid_override_pattern": (pattern * settings.depth)[: settings.depth]}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in ("mamba", "mamba2"):
        # Its inner channels are twice as many as the stream's.
        own = own | {"num_heads": 2 * settings.width // own["head_dim"]} if "num_heads" in own else own
        without = ("intermediate", "head", "position")
        sizes = {key: size for key, size in sizes.items() if not any(part in key for part in without)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **own})
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    folder = Path(tempfile.mkdtemp())
    theirs.save_pretrained(folder)
    ours = from_pretrained(folder)
    shutil.rmtree(folder)
    return ours, theirs


def compared(
    name: str, models: tuple[Any, Any], tokens: int, dtype: str, settings: Settings, sides: set[str]
) -> dict[str, Any]:
    """Steps of these sides on a row of `tokens`, in turns with the products alone."""
    ours, theirs = models
    row = torch.randint(settings.vocab, (1, tokens + 1), generator=torch.Generator().manual_seed(0))

    def our_loss() -> Tensor:
        return ours(row[:, :-1], row[:, 1:]) / tokens

    def their_loss() -> Tensor:
        return theirs(row[:, :-1], labels=row[:, 1:], shift_labels=row[:, 1:], use_cache=False).loss

    steps: dict[str, tuple[Any, Step]] = {OURS: (ours, our_loss), THEIRS: (theirs, their_loss)}
    taken: dict[str, list[Taken]] = {side: [] for side in steps if side in sides}
    rates: list[dict[str, float]] = []
    held = {}
    for turn in range(settings.rounds + 1):
        for side in taken:
            model, loss = steps[side]
            model.zero_grad()
            if turn:
                taken[side].append(timed(loss, autocast(dtype)))
                continue
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            # What was freed before would hide what this step holds.
            give_back_free_memory()
            with AnonymousPeak() as peak:
                timed(loss, autocast(dtype))
            held[side] = peak.bytes
        if turn:
            rates.append(gemm_rates(ours, tokens, getattr(torch, dtype)))
    losses = {side: each[-1].loss for side, each in taken.items()}
    if len(losses) > 1 and abs(losses[OURS] - losses[THEIRS]) > TOLERANCES[dtype] * abs(losses[THEIRS]):
        raise AssertionError(f"{name}: losses differ: {losses}")
    found = {side: medians(each) | {"bytes": held[side]} for side, each in taken.items()}
    rate = {routine: statistics.median(each[routine] for each in rates) for routine in rates[0]}
    flops = 3 * ours.flops(tokens)
    return {
        "family": name,
        "dtype": dtype,
        "tokens": tokens,
        "sides": found,
        "ratio": found[THEIRS]["cpu"] / found[OURS]["cpu"] if len(found) > 1 else None,
        "flops": flops,
        "gemm_flops_per_second": rate,
        "share": flops / found[OURS]["cpu"] / max(rate.values()) if OURS in found else None,
    }


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """What both sides run under."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def medians(taken: list[Taken]) -> dict[str, Any]:
    """Of all rounds, with each round's CPU time."""
    cpu = [each.cpu for each in taken]
    return {
        "cpu": statistics.median(cpu),
        "wall": statistics.median(each.wall for each in taken),
        "rounds": cpu,
    }


def timed(step: Step, context: AbstractContextManager[Any]) -> Taken:
    """A loss and its gradients."""
    began, wall = time.process_time(), time.perf_counter()
    with context:
        loss = step()
    loss.backward()
    return Taken(time.process_time() - began, time.perf_counter() - wall, loss.item())


def gemm_rates(model: torch.nn.Module, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Operations a CPU second of the products of all the model's matrices alone, by each routine."""
    sizes = Counter(tuple(each.weight.shape) for each in model.modules() if isinstance(each, torch.nn.Linear | Head))
    found = {}
    for routine in products.ROUTINES if dtype == torch.float32 else ("torch",):
        if products.unavailable(routine) is not None:
            continue
        flops = seconds = 0.0
        for (outputs, inputs), count in sizes.items():
            # As many rows as the loss takes at once, and no more than are worth waiting for.
            rows = min(tokens, LOSS_ROWS if outputs > FEW_OUTPUTS else GEMM_ROWS)
            each = products.measure(routine, rows, inputs, outputs, dtype=dtype, repeats=min(count, 3))
            flops += 6.0 * count * tokens * inputs * outputs
            seconds += count * tokens / rows * sum(map(statistics.median, each))
        found[routine] = flops / seconds
    return found


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """CPU time a token against length, a panel for each number format; ours solid, transformers' dashed."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = report.new_figure(6.5 * len(dtypes), 5.5)
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for panel, dtype in zip(panels, dtypes, strict=True):
        for number, family in enumerate(families):
            for side, style in ((OURS, "-o"), (THEIRS, "--s")):
                own = [row for row in rows if (row["family"], row["dtype"]) == (family, dtype) and side in row["sides"]]
                times = [1e3 * row["sides"][side]["cpu"] / row["tokens"] for row in own]
                label = f"{family}, {side}"
                panel.plot([row["tokens"] for row in own], times, style, label=label, color=f"C{number}", markersize=4)
        panel.set(yscale="log", xlabel="tokens", title=dtype)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CPU ms a token: loss and gradients")
    panels[-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    report.save_figure(figure, path)
