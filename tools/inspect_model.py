"""Parameters, FLOPs, state and activation bytes of a model, layer by layer, without allocating it.

    python tools/inspect_model.py experiment=long_sequence
    python tools/inspect_model.py model=hybrid_125m train.sequence_length=32768 train.dtype=bfloat16
    python tools/inspect_model.py 'model.layers=[mamba2,attention]' model.depth=48 model.width=4096 model.heads=32 \
        inspect.vocab_size=128256 inspect.output_dir=outputs/inspect_7b

The keys are those of launch/pretrain.py. Counts are those of one rank's micro-batch: train.micro_batch_size rows of
train.sequence_length / parallel.sequence tokens. Left behind in `inspect.output_dir`: inspect_model.json,
inspect_model.png, inspect_model.html (one file).
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from _console import open_console, show_table
from _html import picture, table, text, write_page
from _overrides import count_run, read_run, split_settings
from pydantic import Field

from seqtrain.analysis.counts import ModelCounts
from seqtrain.errors import SeqtrainError
from seqtrain.runtime.settings import micro_batch

MIB = 2**20
COLUMNS = ("layer", "part", "parameters", "forward GFLOP", "a token, kFLOP", "executed GFLOP", "state KiB", "kept MiB")


@dataclass(frozen=True)
class Settings:
    # Ids of the vocabulary; 0: of data.tokenizer.
    vocab_size: Annotated[int, Field(ge=0)] = 0
    # Folder for the results.
    output_dir: str = "outputs/inspect_model"


def rows_of(counts: ModelCounts) -> list[dict[str, Any]]:
    """A row a part: numbers for machines."""
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
            "temporary_bytes": max(part.forward.peak - part.forward.kept, part.backward.peak),
        }
        for part in counts.parts
    ]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's texts under `COLUMNS`."""
    return (
        "" if row["layer"] < 0 else str(row["layer"]),
        row["part"],
        f"{row['parameters']:,}",
        f"{row['forward_flops'] / 1e9:.3f}",
        f"{row['flops_a_token'] / 1e3:,.1f}",
        f"{row['executed_flops'] / 1e9:.3f}",
        f"{row['state_bytes'] / 1024:,.1f}",
        f"{row['saved_bytes'] / MIB:,.2f}",
    )


def totals(counts: ModelCounts) -> dict[str, float]:
    """The whole model, with and without activation checkpointing."""
    return {
        "parameters": counts.parameters,
        "tokens": counts.tokens * counts.rows,
        "forward_flops": counts.forward_flops,
        "step_flops": counts.step_flops,
        "executed_flops": counts.executed_flops(checkpointing=False),
        "executed_flops_checkpointed": counts.executed_flops(checkpointing=True),
        "state_bytes": counts.state_bytes,
        "saved_bytes": counts.saved_bytes(checkpointing=False),
        "saved_bytes_checkpointed": counts.saved_bytes(checkpointing=True),
        "peak_bytes": counts.peak_bytes(checkpointing=False),
        "peak_bytes_checkpointed": counts.peak_bytes(checkpointing=True),
    }


def sentences(whole: dict[str, float]) -> list[str]:
    """The totals in words."""
    again = "with activation checkpointing"
    size = 4 * whole["parameters"] / MIB
    return [
        f"{whole['parameters']:,.0f} parameters, {size:,.1f} MiB in float32; with gradients and AdamW's moments "
        f"{4 * size:,.1f} MiB before ZeRO divides them",
        f"{whole['tokens']:,.0f} tokens at once: {whole['step_flops'] / 1e9:,.2f} GFLOP of the model forward and "
        f"backward; {whole['executed_flops'] / 1e9:,.2f} in products that run, "
        f"{whole['executed_flops_checkpointed'] / 1e9:,.2f} {again}",
        f"state of one sequence after them: {whole['state_bytes'] / MIB:,.3f} MiB",
        f"activations kept {whole['saved_bytes'] / MIB:,.1f} MiB, at the peak with temporaries and gradients "
        f"{whole['peak_bytes'] / MIB:,.1f}; {again} {whole['saved_bytes_checkpointed'] / MIB:,.1f} and "
        f"{whole['peak_bytes_checkpointed'] / MIB:,.1f}",
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Four pictures of bars, a bar a part in the order they run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["part"] for row in rows))
    colour = {kind: colormaps["tab10"](index % 10) for index, kind in enumerate(kinds)}
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = (
        ("parameters", 1e-6, "parameters, millions"),
        ("flops_a_token", 1e-6, "forward MFLOP a token"),
        ("state_bytes", 1 / 1024, "state, KiB a sequence"),
        ("saved_bytes", 1 / MIB, "kept for backward, MiB"),
    )
    for axes, (key, scale, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.bar(range(len(rows)), [row[key] * scale for row in rows], color=[colour[row["part"]] for row in rows])
        axes.set(ylabel=label, xlabel="part, in the order they run")
        axes.grid(axis="y", alpha=0.3)
    handles = [figure.axes[0].bar(0, 0, color=colour[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(kinds), 6), fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    settings, overrides = split_settings(Settings, "inspect", arguments, about=__doc__)
    try:
        config = read_run(overrides)
        counts = count_run(config, vocab_size=settings.vocab_size, rows=micro_batch(config))
    except SeqtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, whole = rows_of(counts), totals(counts)
    table_rows = [cells(row) for row in rows]
    show_table(open_console(), COLUMNS, table_rows)
    print(*sentences(whole), sep="\n")
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"model": asdict(config.model), "dtype": config.train.dtype, "parts": rows, "totals": whole}
    (folder / "inspect_model.json").write_text(json.dumps(report, indent=1))
    draw(rows, folder / "inspect_model.png")
    sections = [
        ("Whole model", text(sentences(whole))),
        ("By part", picture(folder / "inspect_model.png", "counts by part") + table(COLUMNS, table_rows)),
    ]
    write_page(folder / "inspect_model.html", " ".join(overrides) or "the default model", sections)
    print(f"{folder / 'inspect_model.html'}, inspect_model.json, inspect_model.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
