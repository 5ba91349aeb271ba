"""Pretrained weights on disk, one tensor at a time: a folder of safetensors files, or a GGUF file."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.data.tokenizer import check_ids
from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import read_json, sha256_of
from seqtrain.models import gguf
from seqtrain.models.families import Family, family_of
from seqtrain.models.families.dense import Dense
from seqtrain.weights import dtype_of, open_weights, tensors_in

INDEX = "model.safetensors.index.json"
# Factors on the rotation's wavelengths that a GGUF file may hold.
ROTATION = "rope_freqs.weight"
# Files that are a tokenizer, or part of one.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# What a config says where it has a value at all: whole numbers, the least and the most, and numbers above 0.
SIZES = {
    "vocab_size": (1, 2**31),
    "hidden_size": (1, 2**24),
    "num_hidden_layers": (1, 2**16),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**16),
    "sliding_window": (0, 2**63),
}
POSITIVE = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "rope_theta")


@dataclass(frozen=True)
class Source:
    """A pretrained model: its config and its weights, not yet read. As it stands: a folder of safetensors files.

    `path`: folder or GGUF file. `config`: transformers' config of it. `files`: those that hold weights. `shapes`,
    `kinds` (as safetensors files call their dtypes), `places` (the file): of every tensor, by the name it has in a
    Hugging Face checkpoint. `rope_stretch`: factors on the rotation's wavelengths that are stored with the weights
    (GGUF); empty: those of the config. `interleaved`: the rows of q and k are ordered so that neighbors are rotated
    together (GGUF).
    """

    path: Path
    family: Family
    config: Any
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    places: Mapping[str, str]
    rope_stretch: tuple[float, ...] = field(default=(), kw_only=True)
    interleaved: bool = field(default=False, kw_only=True)
    # gguf's reader of the file; None for a folder.
    opened: Any = field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def quantized(self) -> str:
        """The format a file's matrices are quantized to, as `GGUF Q4_1`; empty where nothing was lost."""
        return ""

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor. Raises `CheckpointError` for one that is quantized."""
        return dtype_of(f"source={self.path}", name, self.kinds[name])

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None where there is none. Raises `ConfigError` for ids the model lacks."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder, options = (self.path, {}) if self.path.is_dir() else (self.path.parent, {"gguf_file": self.path.name})
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        # A missing one is reported in many ways, one of them being a tokenizer without tokens.
        except Exception as error:
            found, reason = None, _first_line(error)
        else:
            reason = "it has no tokens"
        if found is None or len(found) <= len(found.all_special_tokens):
            if there := [name for name in TOKENIZERS if os.path.lexists(folder / name) and self.path.is_dir()]:
                raise ConfigError(f"source={self.path}: {there[0]} can't be read: {reason}; mend it, or take it away")
            return None
        check_ids(f"source={self.path}", max(found.get_vocab().values()) + 1, self.config.vocab_size)
        return found

    def reader(self) -> Callable[[str], Tensor]:
        """Reads a tensor by its name; of none that it has read does it hold the numbers. Raises `CheckpointError`."""
        opened = {file.name: open_weights(file) for file in self.files}
        return lambda name: opened[self.places[name]].get_tensor(name)

    def sha256(self) -> str:
        """Of the weights: a file's own hash, or that of the lines `hash  name` of several (as sha256sum writes)."""
        hashes = [f"{sha256_of(file)}  {file.name}\n" for file in self.files]
        return hashes[0].split()[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class GGUFSource(Source):
    """A GGUF file (llama.cpp): its tensors are dequantized to float32, and have their Hugging Face names and rows."""

    def reader(self) -> Callable[[str], Tensor]:
        config = self.config
        names = gguf.hf_names(config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        tensors = {names.get(tensor.name, tensor.name): tensor for tensor in self.opened.tensors}

        def read(name: str) -> Tensor:
            value, kind = gguf.dequantized(tensors[name]), name.split(".")[-2]
            if self.interleaved and kind in heads:
                # Rows 2i, 2i+1 of a head are the pair that i, i + K/2 are in a Hugging Face checkpoint.
                value = value.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
            return value

        return read

    @property
    def quantized(self) -> str:
        kinds = Counter(tensor.tensor_type.name for tensor in self.opened.tensors if len(tensor.shape) > 1)
        return f"GGUF {kinds.most_common(1)[0][0]}" if kinds and set(kinds) - {"F32", "F16", "BF16"} else ""


def open_source(path: str, sha256: str = "") -> Source:
    """The model at `path`, a folder or a GGUF file, its weights found but not read.

    `sha256`: what `Source.sha256` must give; "" trusts the files. Raises `ConfigError` where there is no model of a
    known family, `CheckpointError` for damaged or wrong files.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        source = _open_folder(place)
    elif place.suffix == ".gguf" and place.is_file():
        source = _open_gguf(place)
    else:
        raise ConfigError(f"source={path}: no such folder or .gguf file")
    if sha256 and (came := source.sha256()) != sha256:
        raise CheckpointError(f"source={path}: the weights' sha256 is {came}, but source_sha256={sha256}")
    return source


def _open_folder(folder: Path) -> Source:
    file = folder / "config.json"
    if not file.is_file():
        ggufs = sorted(found.name for found in folder.glob("*.gguf"))
        hint = f"; name the file: source={folder / ggufs[0]}" if ggufs else ""
        raise ConfigError(f"source={folder}: holds no config.json{hint}")
    values = _json(file)
    family = family_of(str(values.get("model_type")), file)
    if "quantization_config" in values:
        raise ConfigError(f"source={folder}: quantized weights (quantization_config); dequantize them first")
    files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    places: dict[str, str] = {}
    for shard in files:
        found = tensors_in(shard)
        if twice := sorted(shapes.keys() & found.keys()):
            raise CheckpointError(f"{shard}: holds {twice[0]}, which another file holds too")
        shapes |= {name: shape for name, (shape, _) in found.items()}
        kinds |= {name: kind for name, (_, kind) in found.items()}
        places |= dict.fromkeys(found, shard.name)
    from transformers import AutoConfig

    options = {"local_files_only": True, "trust_remote_code": False}
    for section in (values, values.get("text_config"), values.get("rope_parameters")):
        _check_sizes(file, section, tensors=len(shapes))
    config = _config(folder, lambda: AutoConfig.from_pretrained(folder, **options))
    return Source(folder, family, family.text_config(config), files, shapes, kinds, places)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files the folder's index names, or the one there is."""
    single, index = folder / "model.safetensors", folder / INDEX
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(f"source={folder}: holds neither model.safetensors nor {INDEX}")
        return (single,)
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: has no weight_map")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is no file in {folder}")
    return tuple(folder / name for name in files)


def _open_gguf(file: Path) -> Source:
    reader = gguf.open_file(file)
    architecture = gguf.architecture_in(reader)
    family = family_of(architecture, file)
    # GGUF writes the last dimension first.
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    rows = shapes.get("token_embd.weight")
    if rows is None:
        raise CheckpointError(f"source={file}: lacks token_embd.weight")
    values = gguf.config_in(reader, file, architecture, rows[0])
    # A tied head is not in the file, and nothing else says that it is tied.
    values["tie_word_embeddings"] = "output.weight" not in shapes
    from transformers import AutoConfig

    _check_sizes(file, values, tensors=len(shapes))
    config = _config(file, lambda: AutoConfig.for_model(architecture, **values))
    stretch = [factor for tensor in reader.tensors if tensor.name == ROTATION for factor in tensor.data.tolist()]
    names = gguf.hf_names(config.num_hidden_layers)
    shapes = {names.get(name, name): shape for name, shape in shapes.items() if name != ROTATION}
    return GGUFSource(
        file,
        family,
        config,
        (file,),
        shapes,
        dict.fromkeys(shapes, "F32"),
        dict.fromkeys(shapes, "model.safetensors"),
        rope_stretch=tuple(stretch),
        interleaved=isinstance(family, Dense) and family.gguf_interleaved,
        opened=reader,
    )


def _check_sizes(file: Path, values: Any, *, tensors: int) -> None:
    """Raises `ConfigError` where a size in `values` is none. `tensors`: how many the model has; a layer has one."""
    for key, came in values.items() if isinstance(values, dict) else ():
        if isinstance(came, bool) or not isinstance(came, int | float):
            continue
        if key in SIZES:
            least, most = SIZES[key]
            if not (least <= came <= most and came == int(came)):
                raise ConfigError(f"{file}: {key}={came}: must be a whole number from {least} to {most}")
        if key in POSITIVE and not 0 < came < math.inf:
            raise ConfigError(f"{file}: {key}={came}: must be a finite number above 0")
        if key == "num_hidden_layers" and came > tensors:
            raise ConfigError(f"{file}: {key}={came}, but the weights are {tensors} tensors")


def _config(where: Path, read: Callable[[], Any]) -> Any:
    """The transformers config that `read` gives."""
    try:
        return read()
    # What a config class thinks of its values comes as one of many types.
    except Exception as error:
        raise ConfigError(f"source={where}: its config can't be read: {' '.join(str(error).split())}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: is not JSON: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold an object, not {type(values).__name__}")
    return values


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
