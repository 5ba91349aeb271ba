"""What spikes cost a pretrained model, and how many they are: perplexity and four figures by the rate k (SpikingBrain).

    python tools/measure_spikes.py source=path/to/SmolLM2-135M
    python tools/measure_spikes.py source=path/to/Qwen3-0.6B tokens=2048 output_dir=outputs/spikes_qwen
    python tools/measure_spikes.py source=path/to/model.gguf 'rates=[2,3,4]' weight_bits=0 'texts={prose: hamlet.txt}'

The inputs of every linear projection of mixers and MLPs become counts by a threshold of mean |x| / k, their weights
integers of `weight_bits` bits with a scale for each 128 of a row; embedding, head and norms stay. Silent: values
without a spike. Spikes: mean spikes a value, in trains of a step a bit. Within: values that fit into three steps,
counts up to 7. Sparsity: empty places of these three. The report (arXiv 2509.05276, section 5.5) has 18.4%, 1.13, 94.1%
and 69.15% for its 7B at k = 3. One table, and results.json.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from seqtrain.config import read_settings
from seqtrain.convert.architecture import architecture_of
from seqtrain.convert.measure import ModelOnTexts, Text, perplexities
from seqtrain.models import LanguageModel
from seqtrain.models.spiking import counting_spikes, round_weights, spike_inputs, spike_statistics
from seqtrain.report import LiveTable, write_results
from seqtrain.validation import FilePath


@dataclass(frozen=True)
class Settings(ModelOnTexts):
    # Mean spikes a value, k; one row each.
    rates: tuple[Annotated[float, Field(gt=0)], ...] = (2.0, 3.0, 4.0)
    # Bits of the projections' weights, 8 in the report; 0: as they are.
    weight_bits: Annotated[int, Field(ge=0, le=16)] = 8
    # Numbers of a row that share a scale.
    weight_group: Annotated[int, Field(gt=0)] = 128
    # Folder for the results.
    output_dir: FilePath = "outputs/spikes"


def main(arguments: Sequence[str]) -> int:
    """Prints the table; gives the exit status."""
    settings = read_settings(Settings, arguments)
    model, texts = settings.open(architecture_of)
    columns = {"": "14s", **{text.name: "9.3f" for text in texts}}
    table = LiveTable(columns | {"silent": "8.4f", "spikes": "8.4f", "within 7": "9.4f", "sparsity": "9.4f"})
    print(table.header)
    rows = []
    for row in measure(model, texts, settings):
        figures = row["spikes"] or {}
        shown = (figures.get(name) for name in ("silent", "spikes", "within", "sparsity"))
        print(table.row(row["name"], *row["perplexity"].values(), *shown), flush=True)
        rows.append(row)
    output = Path(settings.output_dir)
    write_results(output / "results.json", settings, rows=rows)
    print(f"results: {output}")
    return 0


@torch.no_grad()
def measure(model: LanguageModel, texts: Sequence[Text], settings: Settings) -> Any:
    """The rows of the table, one after the other: as it is, with rounded weights, and with spikes at each rate.

    `model` has the rounded weights and the spikes of the last rate afterwards.
    """
    yield _row("as it is", model, texts)
    if settings.weight_bits:
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(
                    round_weights(module.weight, bits=settings.weight_bits, group=settings.weight_group)
                )
        yield _row(f"INT{settings.weight_bits} weights", model, texts)
    for rate in settings.rates:
        spike_inputs(model.blocks, rate)
        with counting_spikes(model):
            yield _row(f"k = {rate:g}", model, texts)


def _row(name: str, model: LanguageModel, texts: Sequence[Text]) -> dict[str, Any]:
    found = perplexities(model, texts)
    spikes = spike_statistics(model)
    return {"name": name, "perplexity": found, "spikes": None if spikes is None else asdict(spikes)}
