"""A trained model with what belongs to it, from a run's folder or an exported one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqtrain.config import read_run_config
from seqtrain.data import Tokenizer, load_tokenizer
from seqtrain.data.tokenizer import HuggingFaceTokenizer, check_ids
from seqtrain.errors import CheckpointError, ConfigError, SeqtrainError
from seqtrain.files import in_store, place, read_json
from seqtrain.models import LanguageModel
from seqtrain.models.pretrained import from_pretrained
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.checks import check_store
from seqtrain.runtime.resolving import typed_pretrain_config
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.source import build_model, first_weights, frozen_weights
from seqtrain.weights import check_finite, dtype_of, tensors_in


@dataclass(frozen=True)
class Loaded:
    """`model`: in evaluation mode, on the CPU.

    `config`: a run's `PretrainConfig`, an exported `SeqtrainConfig`, or another's config.json. `exported`: whether it
    is no run.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: Any
    exported: bool


def load(folder: str | Path, *, key: str = "") -> Loaded:
    """The newest checkpoint of the run in `folder`, or the exported model there or in its folder `model`.

    `key`: which named the folder. Raises `ConfigError` where there is neither, or more ids of a tokenizer than
    embeddings, `CheckpointError` where a run has no whole checkpoint.
    """
    path = place_of_run(str(folder))
    path = path.expanduser() if isinstance(path, Path) else path
    if (exported := exported_in(path)) is not None:
        return _load_exported(exported)
    if not (path / "config.yaml").is_file():
        where = f"{key}={path}" if key else path
        raise ConfigError(f"{where}: is neither a run (config.yaml) nor an exported model (config.json)")
    config, model, tokenizer = open_run(path)
    return Loaded(model, tokenizer, config, exported=False)


def exported_in(path: Path) -> Path | None:
    """The exported model that `path` is, or that lies in its folder `model` where it is no run; None for none."""
    if (path / "config.json").is_file():
        return path
    inside = path / "model"
    return inside if (inside / "config.json").is_file() and not (path / "config.yaml").is_file() else None


def _load_exported(folder: Path) -> Loaded:
    if read_json(folder / "config.json").get("model_type") != "seqtrain":
        model = from_pretrained(folder)
        return Loaded(model, _tokenizer_in(folder, model.vocab_size), model.origin.config, exported=True)
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
    return Loaded(exported.model.eval(), tokenizer, exported.config, exported=True)


def _tokenizer_in(folder: Path, vocab_size: int) -> Tokenizer:
    tokenizer = HuggingFaceTokenizer(str(folder))
    check_ids(str(folder), tokenizer.vocab_size, vocab_size)
    return tokenizer


def open_run(path: Path) -> tuple[PretrainConfig, LanguageModel, Tokenizer]:
    """The config, the model with the newest checkpoint's weights, and the tokenizer of the run in folder `path`.

    Raises `ConfigError` where there is no run, `CheckpointError` where it has no whole checkpoint.
    """
    values = read_run_config(path)
    try:
        config = typed_pretrain_config(values)
    except ConfigError as error:
        raise ConfigError(f"run={path}: config.yaml is damaged: {error}") from error
    folder = finished_folder(path, config.checkpoint.store)
    tokenizer, built = load_tokenizer(config.data), []

    def load(newest: checkpoints.Checkpoint) -> None:
        _check_tokenizer(newest, config, tokenizer)
        built.append(_with_weights(newest, config, tokenizer))

    if checkpoints.find(folder.checkpoints, load) is None:
        raise CheckpointError(f"{folder.checkpoints}: holds no whole checkpoint")
    return config, built[0].eval(), tokenizer


def finished_folder(path: Path, store: str) -> RunFolder:
    """Of a run that `path` has, or copies of its records, beside which the checkpoints are, or which are in `store`."""
    beside = not isinstance(path, Path) or (path / "checkpoints").exists()
    if store and not beside:
        check_store(store, read=True)
    return RunFolder(path, "" if beside else store)


def place_of_run(name: str) -> Path:
    """The folder of a run, or where a store has copies of one. Raises `ConfigError` for a store that can't be read."""
    if in_store(name):
        check_store(name, name="run", read=True)
    return place(name)


def _check_tokenizer(newest: checkpoints.Checkpoint, config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Raises `CheckpointError` for another one than it was trained with."""
    made_with = newest.manifest.trajectory.get("data", {}).get("content", {}).get("tokenizer", tokenizer.identity)
    if made_with != tokenizer.identity:
        raise CheckpointError(
            f"{newest.folder}: was trained with another tokenizer than data.tokenizer={config.data.tokenizer} is now "
            f"({made_with[:12]}, now {tokenizer.identity[:12]}); put the old one back"
        )


def _with_weights(newest: checkpoints.Checkpoint, config: PretrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    model = build_model(config, tokenizer.vocab_size)
    if frozen := frozen_weights(config, model):
        others = first_weights(config, model, sha256=newest.manifest.trajectory["lora"]["source_sha256"])
    else:
        others = model.initial_weights(config.seed)
    newest.load_weights(model, frozen=frozen, others=others)
    return model
