"""A trained model with what belongs to it, from a run's folder or an exported one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.data import Tokenizer
from seqtrain.data.tokenizer import HuggingFaceTokenizer, check_ids
from seqtrain.errors import ConfigError
from seqtrain.models import LanguageModel
from seqtrain.runtime.generate import open_run


@dataclass(frozen=True)
class Loaded:
    """`model`: in evaluation mode, on the CPU. `config`: a run's `PretrainConfig`, or an exported `SeqtrainConfig`."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: Any


def load(folder: str | Path) -> Loaded:
    """The newest checkpoint of the run in `folder`, or the exported model there or in its folder `model`.

    Raises `ConfigError` where there is neither, or more ids of a tokenizer than embeddings, `CheckpointError` where a
    run has no whole checkpoint.
    """
    path = Path(folder).expanduser()
    for place in (path, path / "model"):
        if (place / "config.json").is_file():
            from seqtrain.models.huggingface import SeqtrainForCausalLM

            exported, theirs = SeqtrainForCausalLM.from_pretrained(place), HuggingFaceTokenizer(str(place))
            check_ids(str(place), theirs.vocab_size, exported.config.vocab_size)
            return Loaded(exported.model.eval(), theirs, exported.config)
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: is neither a run (config.yaml) nor an exported model (config.json)")
    config, model, tokenizer = open_run(path)
    return Loaded(model, tokenizer, config)
