"""What a pretrained or converted model loses where its states are kept in few bits (TurboQuant): perplexity and bytes.

    python tools/measure_state_bits.py source=path/to/SmolLM2-135M
    python tools/measure_state_bits.py source=converted/model 'bits=[4]' 'round_every=[1,16,64]'
    python tools/measure_state_bits.py source=path/to/model.gguf 'texts={prose: hamlet.txt}'

Texts are read as generation with `generation.state_bits` and `generation.round_every` reads what it has written: so
many tokens at a time, each time from states that were rounded. State: bytes of one row's after `tokens` tokens. One
table, and results.json.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from seqtrain.config import read_settings
from seqtrain.convert.measure import ModelOnTexts, Text, perplexities, perplexity, surprise
from seqtrain.models import LanguageModel
from seqtrain.models.pretrained import architecture_of
from seqtrain.models.rounded_states import GenerationConfig, RoundedStates
from seqtrain.report import LiveTable, write_results
from seqtrain.validation import FilePath


@dataclass(frozen=True)
class Settings(ModelOnTexts):
    # Bits of a number; a row each.
    bits: tuple[Literal[2, 3, 4], ...] = (4, 3, 2)
    # Tokens after which states are rounded; a row each.
    round_every: tuple[Annotated[int, Field(gt=0)], ...] = (16,)
    # Folder for the results.
    output_dir: FilePath = "outputs/state_bits"


def main(arguments: Sequence[str]) -> int:
    """Prints the table; gives the exit status."""
    settings = read_settings(Settings, arguments)
    model, texts = settings.open(architecture_of)
    table = LiveTable({"": "18s", **{text.name: "9.3f" for text in texts}, "state KiB": "10.1f"})
    print(table.header)
    rows = []
    for row in measure(model, texts, settings):
        print(table.row(row["name"], *row["perplexity"].values(), row["state_bytes"] / 1024), flush=True)
        rows.append(row)
    output = Path(settings.output_dir)
    write_results(output / "results.json", settings, rows=rows)
    print(f"results: {output}")
    return 0


@torch.no_grad()
def measure(model: LanguageModel, texts: Sequence[Text], settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of the table, one after the other: states as they are, then in few bits."""
    whole = perplexities(model, texts)
    yield {"name": "as they are", "perplexity": whole, "state_bytes": model.state_bytes(settings.tokens)}
    for every in settings.round_every:
        for bits in settings.bits:
            found, size = {}, 0
            for text in texts:
                hidden, state = read(model, text.tokens, GenerationConfig(bits, every))
                found[text.name] = perplexity(surprise(model, hidden, text.tokens))
                size = state.nbytes // len(text.tokens)
            yield {"name": f"{bits} bits, every {every}", "perplexity": found, "state_bytes": size}


def read(model: LanguageModel, tokens: Tensor, config: GenerationConfig) -> tuple[Tensor, RoundedStates]:
    """What the head is given for `tokens: int64 [B,T]`, and the states after them, which are rounded on the way."""
    state, hidden = RoundedStates(len(model.blocks), config), []
    for part in tokens.split(config.round_every, 1):
        x, state = model.hidden(part, state)
        hidden.append(x)
    return torch.cat(hidden, 1), state
