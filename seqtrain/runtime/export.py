"""Writes a run's newest checkpoint as a folder that transformers loads, with its tokenizer.

    python tools/export.py run=runs/mine output_dir=exported
    python tools/export.py run=runs/mine as=seqtrain output_dir=exported
    python tools/export.py run=runs/2026-01-31/12-00-00 output_dir=~/models/mine

`as=seqtrain` is seqtrain's own model type: `AutoModelForCausalLM.from_pretrained` knows it after `import seqtrain`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.files import replacing
from seqtrain.runtime.generate import open_run
from seqtrain.validation import FilePath


@dataclass(frozen=True)
class Settings:
    # output_dir of the run whose newest checkpoint is exported.
    run: FilePath
    # Folder that is made.
    output_dir: FilePath
    # Type of the model that is written.
    as_: Literal["seqtrain"] = "seqtrain"


def main(arguments: Sequence[str]) -> int:
    """Writes the folder; gives the exit status."""
    settings = read_settings(Settings, arguments)
    folder = Path(settings.output_dir)
    if folder.exists():
        raise ConfigError(f"output_dir={folder}: exists already; name a new folder")
    config, model, tokenizer = open_run(Path(settings.run))
    from seqtrain.models.export import as_huggingface

    length = config.train.sequence_length
    theirs = as_huggingface(
        model, config.mixer, eos_token_id=tokenizer.end, pad_token_id=tokenizer.end, max_position_embeddings=length
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        theirs.save_pretrained(unfinished)
        tokenizer.as_huggingface().save_pretrained(unfinished)
    print(f"exported: {folder}")
    return 0
