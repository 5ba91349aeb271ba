"""Compares a training step of models of Hugging Face's families with transformers' own at equal weights, in turns.

    python tools/bench_families.py
    python tools/bench_families.py 'families=[mamba2]' 'tokens=[8192]' rounds=3
    python tools/bench_families.py 'families=[llama,qwen3_next]' width=256 depth=4 output_dir=outputs/small

Each family's model is made by transformers with `depth` layers of width `width`, saved, and read by
`seqtrain.models.from_pretrained`; both take the loss of the same row and its gradients, in float32 on the CPU. CPU time
is compared, the least of all rounds, and the most memory a step held beyond weights and gradients. transformers runs on
its own PyTorch path, with SDPA where it has it. With more than one thread, where others keep the cores busy, threads
that wait count as CPU time, too.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.memory import AnonymousPeak
from seqtrain.models import from_pretrained
from seqtrain.report import in_a_line, machine, show_table, write_results

DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MAMBA2 = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
# By `model_type`: what transformers calls its classes, and what of its config the common sizes do not say: the shape of
# a published model (of the smallest where they differ), brought to a width of 512.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "olmo_hybrid": ("OlmoHybrid", DELTA),
    "qwen3_next": ("Qwen3Next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 256, "head_dim": 64}),
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


@dataclass(frozen=True)
class Settings:
    # Families that are compared.
    families: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(FAMILIES)
    # Lengths of the row.
    tokens: Annotated[tuple[Annotated[int, Field(gt=1)], ...], Field(min_length=1)] = (2048, 8192)
    # Channels of the residual stream.
    width: Annotated[int, Field(gt=0)] = 512
    # Layers.
    depth: Annotated[int, Field(gt=0)] = 8
    # Rows of embedding and head.
    vocab: Annotated[int, Field(gt=0)] = 4096
    # Threads of both; 0: as many as there are cores.
    threads: Annotated[int, Field(ge=0)] = 0
    # Times each side takes the step, in turns.
    rounds: Annotated[int, Field(gt=0)] = 2
    output_dir: str = "outputs/bench_families"


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    for name in settings.families:
        if name not in FAMILIES:
            raise ConfigError("families: " + unknown_name("family", name, FAMILIES))
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    about = machine() | {"transformers": transformers.__version__}
    print(in_a_line(about), flush=True)
    rows: list[dict[str, Any]] = []
    for name in settings.families:
        sides = both(name, settings)
        for tokens in settings.tokens:
            rows.append(compared(name, sides, tokens, settings))
            print(
                f"{name} {tokens}: {rows[-1]['ours']:.2f} s, {rows[-1]['theirs']:.2f} s, {rows[-1]['ratio']:.2f}",
                flush=True,
            )
    cells = [
        (row["family"], f"{row['tokens']:,}", f"{row['ours']:.2f}", f"{row['theirs']:.2f}", f"{row['ratio']:.2f}",
         f"{row['our_bytes'] / 2**20:.0f}", f"{row['their_bytes'] / 2**20:.0f}")
        for row in rows
    ]  # fmt: skip
    print()
    show_table(("family", "tokens", "CPU s", "transformers", "ratio", "MiB", "transformers' MiB"), cells)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "bench_families.json", settings, about=about, rows=rows)
    return 0


def both(name: str, settings: Settings) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and transformers', with the same weights."""
    import transformers

    kind, own = FAMILIES[name]
    sizes = {"hidden_size": settings.width, "vocab_size": settings.vocab, "num_hidden_layers": settings.depth}
    sizes |= {"intermediate_size": 3 * settings.width, "num_attention_heads": 8, "num_key_value_heads": 4}
    if pattern := own.get("hybrid_override_pattern"):
        own = own | {"hybrid_override_pattern": (pattern * settings.depth)[: settings.depth]}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in ("mamba", "mamba2"):
        sizes = {key: size for key, size in sizes.items() if "intermediate" not in key and "head" not in key}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **own})
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    folder = Path(tempfile.mkdtemp())
    theirs.save_pretrained(folder)
    ours = from_pretrained(folder)
    shutil.rmtree(folder)
    return ours, theirs


def compared(name: str, sides: tuple[Any, Any], tokens: int, settings: Settings) -> dict[str, Any]:
    """Both sides' steps on a row of `tokens`, in turns."""
    ours, theirs = sides
    row = torch.randint(settings.vocab, (1, tokens + 1), generator=torch.Generator().manual_seed(0))

    def our_step() -> float:
        loss = ours(row[:, :-1], row[:, 1:]) / tokens
        loss.backward()
        return loss.item()

    def their_step() -> float:
        loss = theirs(row[:, :-1], labels=row[:, 1:], shift_labels=row[:, 1:], use_cache=False).loss
        loss.backward()
        return loss.item()

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    held: dict[str, list[int]] = {"ours": [], "theirs": []}
    losses = {}
    for _ in range(settings.rounds):
        for side, model, step in (("ours", ours, our_step), ("theirs", theirs, their_step)):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            taken, most, losses[side] = timed(step)
            seconds[side].append(taken)
            held[side].append(most)
    if abs(losses["ours"] - losses["theirs"]) > 1e-4 * abs(losses["theirs"]):
        raise AssertionError(f"{name}: losses differ: {losses}")
    best = {side: min(each) for side, each in seconds.items()}
    return {
        "family": name,
        "tokens": tokens,
        **best,
        "ratio": best["theirs"] / best["ours"],
        "our_bytes": min(held["ours"]),
        "their_bytes": min(held["theirs"]),
        "rounds": seconds,
    }


def timed(step: Callable[[], float]) -> tuple[float, int, float]:
    """CPU seconds of a step, the most memory it held, and what it gives."""
    with AnonymousPeak() as peak:
        began = time.process_time()
        result = step()
        taken = time.process_time() - began
    return taken, peak.bytes, result
