"""Writes a run's newest checkpoint as a folder that transformers loads, with its tokenizer.

    python tools/export.py run=runs/mine output_dir=exported
    python tools/export.py run=runs/mine as=seqtrain output_dir=exported
    python tools/export.py run=runs/2026-01-31/12-00-00 output_dir=~/models/mine
    python tools/export.py run=runs/adapters merge=true output_dir=merged

`as=seqtrain` is seqtrain's own model type: `AutoModelForCausalLM.from_pretrained` knows it after `import seqtrain`. A
run that continued another model (`source=`) is written as the type that model was. `as=FAMILY` (llama, qwen3,
mamba2, olmo_hybrid, qwen3_next) is for a model that has that family's layers, and plain transformers loads it. Of a run
that trained adapters (`lora.rank=`) they are written, as PEFT has them; with `merge=true` the model they make.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seqtrain.config import read_settings
from seqtrain.data import Tokenizer
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.files import replacing
from seqtrain.models import LanguageModel
from seqtrain.models.families import FAMILIES
from seqtrain.models.lora import merge_adapters
from seqtrain.models.pretrained import export_as
from seqtrain.runtime.loading import open_run, place_of_run
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.source import type_of_source, write_as_source, write_own_adapter
from seqtrain.validation import FilePath

# What is written in place of a model.
ADAPTER = "adapter"


@dataclass(frozen=True)
class Settings:
    # output_dir of the run whose newest checkpoint is exported.
    run: FilePath
    # Folder that is made.
    output_dir: FilePath
    # Type of the model that is written: seqtrain, that of the model the run continued, or of a family that the model
    # fits, such as llama. Empty: the second, if there is one, else the first.
    as_: str = ""
    # Adapters are added to the weights they are for, and the model is written; else they are written alone.
    merge: bool = False


def main(arguments: Sequence[str]) -> int:
    """Writes the folder; gives the exit status."""
    settings = read_settings(Settings, arguments)
    folder = Path(settings.output_dir)
    config, model, tokenizer = open_run(place_of_run(settings.run))
    source = type_of_source(config) if config.source else ""
    kind = _kind(settings, config, source)
    if settings.merge:
        merge_adapters(model)
    if folder.exists():
        raise ConfigError(f"output_dir={folder}: exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        if kind == ADAPTER:
            write_own_adapter(config, model, unfinished)
        elif kind == source:
            write_as_source(config, model, unfinished)
        elif kind == "seqtrain":
            _write_own(config, model, tokenizer, unfinished)
        else:
            ends = {"bos_token_id": None, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
            export_as(model, kind, unfinished, max_position_embeddings=config.train.sequence_length, **ends)
            tokenizer.as_huggingface().save_pretrained(unfinished)
    print(f"exported: {folder}")
    return 0


def _kind(settings: Settings, config: PretrainConfig, source: str) -> str:
    """What is written: ADAPTER or a model type; `source`: that of the run's source. Raises `ConfigError`."""
    if settings.merge and not config.lora.rank:
        raise ConfigError(f"merge=true: run={settings.run} trained no adapters; leave it out")
    if config.lora.rank and not settings.merge:
        if settings.as_:
            raise ConfigError(
                f"as={settings.as_}: run={settings.run} trained adapters; merge=true makes a model of them"
            )
        return ADAPTER
    kind = settings.as_ or source or "seqtrain"
    if kind not in ("seqtrain", *FAMILIES):
        raise ConfigError(unknown_name("as=", kind, ("seqtrain", *FAMILIES)))
    return kind


def _write_own(config: PretrainConfig, model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """As seqtrain's own model type."""
    from seqtrain.models.export import as_huggingface

    tokens = {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    theirs = as_huggingface(model, config.mixer, max_position_embeddings=config.train.sequence_length, **tokens)
    theirs.save_pretrained(folder)
    tokenizer.as_huggingface().save_pretrained(folder)
