"""Parameters, FLOPs, state and activation bytes of a model, layer by layer, without allocating it.

    python tools/inspect_model.py experiment=long_sequence
    python tools/inspect_model.py model=hybrid_125m train.sequence_length=32768 train.dtype=bfloat16
    python tools/inspect_model.py 'model.layers=[mamba2,attention]' model.depth=48 model.width=4096 model.heads=32 \
        inspect.vocab_size=128256 inspect.output_dir=outputs/inspect_7b

The keys are those of launch/pretrain.py. Counts are those of one rank's micro-batch: train.micro_batch_size rows of
train.sequence_length / parallel.sequence tokens. `inspect.output_dir` gets inspect_model.json,
inspect_model.png and inspect_model.html (one file).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from seqtrain import report
from seqtrain.config import split_settings
from seqtrain.models.rounded_states import STATE_BITS
from seqtrain.planning.counts import ModelCounts
from seqtrain.planning.run_config import count_run, read_run
from seqtrain.runtime.settings import micro_batch

MIB = 2**20
# What the table shows of a row of `rows_of`.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": lambda row: "" if row["layer"] < 0 else str(row["layer"]),
    "part": lambda row: row["part"],
    "parameters": lambda row: f"{row['parameters']:,}",
    "kFLOP per token": lambda row: f"{row['flops_a_token'] / 1e3:,.1f}",
    "executed GFLOP": lambda row: f"{row['executed_flops'] / 1e9:.3f}",
    "state KiB": lambda row: f"{row['state_bytes'] / 1024:,.1f}",
    "kept MiB": lambda row: f"{row['saved_bytes'] / MIB:,.2f}",
}


@dataclass(frozen=True)
class Settings:
    # Ids of the vocabulary; 0: of data.tokenizer.
    vocab_size: Annotated[int, Field(ge=0)] = 0
    # Folder for the results.
    output_dir: str = "outputs/inspect_model"


def rows_of(counts: ModelCounts) -> list[dict[str, Any]]:
    """One row per part, in numbers."""
    return [
        {
            "layer": part.layer,
            "part": part.kind or part.part,
            "parameters": part.parameters,
            "forward_flops": part.forward_flops,
            "flops_a_token": part.forward_flops / (counts.tokens * counts.rows),
            "executed_flops": part.executed_forward + part.executed_backward,
            "state_bytes": part.state_bytes,
            "saved_bytes": part.saved_bytes,
            "temporary_bytes": max(part.forward.peak - part.saved_bytes, part.backward.peak),
        }
        for part in counts.parts
    ]


def totals(counts: ModelCounts) -> dict[str, float]:
    """The whole model, with and without activation checkpointing."""
    found = {
        name: getattr(counts, name) for name in ("parameters", "trained", "forward_flops", "step_flops", "state_bytes")
    }
    found |= {f"state_bytes_{bits}_bits": counts.rounded_state_bytes(bits) for bits in STATE_BITS}
    found["tokens"] = counts.tokens * counts.rows
    for name in ("executed_flops", "saved_bytes", "peak_bytes"):
        for suffix in ("", "_checkpointed"):
            found[name + suffix] = getattr(counts, name)(checkpointing=bool(suffix))
    return found


def sentences(whole: dict[str, float]) -> list[str]:
    """The totals in words."""
    again = "with activation checkpointing"
    size, trained = 4 * whole["parameters"] / MIB, 4 * whole["trained"] / MIB
    some = f", {whole['trained']:,.0f} of them trained" if trained < size else ""
    return [
        f"{whole['parameters']:,.0f} parameters{some}, {size:,.1f} MiB in float32; with gradients and AdamW's moments "
        f"{size + 3 * trained:,.1f} MiB before ZeRO divides them",
        f"{whole['tokens']:,.0f} tokens at once: {whole['step_flops'] / 1e9:,.2f} GFLOP of the model forward and "
        f"backward; {whole['executed_flops'] / 1e9:,.2f} in products that run, "
        f"{whole['executed_flops_checkpointed'] / 1e9:,.2f} {again}",
        f"state of one sequence after them: {whole['state_bytes'] / MIB:,.3f} MiB; with generation.state_bits="
        f"{'|'.join(map(str, STATE_BITS))} "
        f"{', '.join(format(whole[f'state_bytes_{bits}_bits'] / MIB, ',.3f') for bits in STATE_BITS)}",
        f"activations kept {whole['saved_bytes'] / MIB:,.1f} MiB, at the peak with temporaries and gradients "
        f"{whole['peak_bytes'] / MIB:,.1f}; {again} {whole['saved_bytes_checkpointed'] / MIB:,.1f} and "
        f"{whole['peak_bytes_checkpointed'] / MIB:,.1f}",
    ]


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Four pictures of bars, one bar per layer, made of its mixer and its MLP, the first on top."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = row["part"] if row["layer"] < 0 else f"layer {row['layer']}"
        layers.setdefault(label, []).append(row)
    names = [f"{label} {parts[0]['part']}" if len(parts) > 1 else label for label, parts in layers.items()]
    figure = report.new_figure(12, 1.8 + 0.22 * len(layers))
    panels = (
        ("parameters", 1e-6, "Parameters, millions"),
        ("flops_a_token", 1e-6, "Forward MFLOP per token"),
        ("state_bytes", 1 / 1024, "State, KiB per sequence"),
        ("saved_bytes", 1 / MIB, "Kept for backward, MiB"),
    )
    # An MLP comes after its mixer, whichever that is.
    order = dict.fromkeys(sorted((row["part"] for row in rows), key=lambda part: part in ("mlp", "loss")), 0)
    every = figure.subplots(1, 4, sharey=True)
    for axes, (key, scale, label) in zip(every, panels, strict=True):
        values = [order | {row["part"]: row[key] for row in parts} for parts in layers.values()]
        report.stacked_bars(axes, names, values, scale=scale)
        axes.set_title(label, fontsize=10)
    every[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    report.save_figure(figure, path)


def main(arguments: list[str]) -> int:
    settings, overrides = split_settings(Settings, "inspect", arguments)
    config = read_run(overrides)
    with report.announced("counting the model's work"):
        counts = count_run(config, vocab_size=settings.vocab_size, rows=micro_batch(config))
    rows, whole = rows_of(counts), totals(counts)
    table = tuple(COLUMNS), [[form(row) for form in COLUMNS.values()] for row in rows]
    report.show_table(*table)
    report.say(*sentences(whole))
    folder = Path(settings.output_dir)
    content = {"model": asdict(config.model), "dtype": config.train.dtype, "parts": rows, "totals": whole}
    report.write_json(folder / "inspect_model.json", content)
    title = f"{config.presets.get('model', 'model')}: {whole['parameters'] / 1e6:,.1f}M parameters, "
    draw(rows, f"{title}{counts.rows} x {counts.tokens:,} tokens at once", folder / "inspect_model.png")
    by_part = report.picture(folder / "inspect_model.png", "counts by part") + report.table(*table)
    sections = [("Whole model", report.text(sentences(whole))), ("By part", by_part)]
    report.write_page(folder / "inspect_model.html", " ".join(overrides) or "the default model", sections)
    print(f"{folder / 'inspect_model.html'}, inspect_model.json, inspect_model.png")
    return 0
