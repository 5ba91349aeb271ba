"""A trained model with what belongs to it, from a run's folder or an exported one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.data import Tokenizer
from seqtrain.data.tokenizer import HuggingFaceTokenizer, check_ids
from seqtrain.errors import CheckpointError, ConfigError, SeqtrainError
from seqtrain.files import read_json
from seqtrain.models import LanguageModel
from seqtrain.models.pretrained import from_pretrained
from seqtrain.runtime.generate import open_run, place_of_run
from seqtrain.weights import check_finite, dtype_of, tensors_in


@dataclass(frozen=True)
class Loaded:
    """`model`: in evaluation mode, on the CPU.

    `config`: a run's `PretrainConfig`, an exported `SeqtrainConfig`, or another's config.json.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: Any


def load(folder: str | Path) -> Loaded:
    """The newest checkpoint of the run in `folder`, or the exported model there or in its folder `model`.

    Raises `ConfigError` where there is neither, or more ids of a tokenizer than embeddings, `CheckpointError` where a
    run has no whole checkpoint.
    """
    path = place_of_run(str(folder))
    path = path.expanduser() if isinstance(path, Path) else path
    for exported in (path, path / "model"):
        if (exported / "config.json").is_file():
            return _load_exported(exported)
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: is neither a run (config.yaml) nor an exported model (config.json)")
    config, model, tokenizer = open_run(path)
    return Loaded(model, tokenizer, config)


def _load_exported(folder: Path) -> Loaded:
    if read_json(folder / "config.json").get("model_type") != "seqtrain":
        model = from_pretrained(folder)
        return Loaded(model, _tokenizer_in(folder, model.vocab_size), model.origin.config)
    from seqtrain.models.huggingface import SeqtrainForCausalLM

    for file in folder.glob("*.safetensors"):
        for name, (_, kind) in tensors_in(file).items():
            dtype_of(file, name, kind)
    try:
        exported, told = SeqtrainForCausalLM.from_pretrained(folder, output_loading_info=True)
    except SeqtrainError:
        raise
    # Files of any content end in any kind of error.
    except Exception as error:
        raise ConfigError(f"{folder}: can't be loaded: {str(error) or type(error).__name__}") from error
    # What is missing would be drawn at random.
    if wrong := sorted(map(str, [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]])):
        raise CheckpointError(f"{folder}: {wrong[0]} is not in both its weights and its config.json")
    for name, weight in exported.named_parameters():
        check_finite(folder, name, weight)
    tokenizer = _tokenizer_in(folder, exported.config.vocab_size)
    return Loaded(exported.model.eval(), tokenizer, exported.config)


def _tokenizer_in(folder: Path, vocab_size: int) -> Tokenizer:
    tokenizer = HuggingFaceTokenizer(str(folder))
    check_ids(str(folder), tokenizer.vocab_size, vocab_size)
    return tokenizer
