"""Pretrained weights on disk, one tensor at a time: a folder of safetensors files, or a GGUF file.

Where each weight belongs is said by one table for teachers and students: a model whose attention has been replaced has
all parameters of the table, too.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seqtrain.convert import gguf
from seqtrain.data.tokenizer import check_ids
from seqtrain.errors import CheckpointError, ConfigError, unknown_name
from seqtrain.files import read_json, sha256_of
from seqtrain.weights import open_weights, shapes_in

INDEX = "model.safetensors.index.json"
# Factors on the rotation's wavelengths that a GGUF file may hold.
ROTATION = "rope_freqs.weight"
# A module of a Hugging Face checkpoint, that of `LanguageModel`, the part of it where it is fused, and GGUF's name;
# `{i}` stands for a layer.
Row = tuple[str, str, str, str]
MODULES: tuple[Row, ...] = (
    ("model.embed_tokens", "embedding", "", "token_embd"),
    ("model.layers.{i}.input_layernorm", "blocks.{i}.mixer_norm", "", "blk.{i}.attn_norm"),
    ("model.layers.{i}.self_attn.q_proj", "blocks.{i}.mixer.qkv", "q", "blk.{i}.attn_q"),
    ("model.layers.{i}.self_attn.k_proj", "blocks.{i}.mixer.qkv", "k", "blk.{i}.attn_k"),
    ("model.layers.{i}.self_attn.v_proj", "blocks.{i}.mixer.qkv", "v", "blk.{i}.attn_v"),
    ("model.layers.{i}.self_attn.o_proj", "blocks.{i}.mixer.out", "", "blk.{i}.attn_output"),
    ("model.layers.{i}.post_attention_layernorm", "blocks.{i}.mlp_norm", "", "blk.{i}.ffn_norm"),
    ("model.layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.up", "gate", "blk.{i}.ffn_gate"),
    ("model.layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up", "value", "blk.{i}.ffn_up"),
    ("model.layers.{i}.mlp.down_proj", "blocks.{i}.mlp.out", "", "blk.{i}.ffn_down"),
    ("model.norm", "norm", "", "output_norm"),
    ("lm_head", "head", "", "output"),
)
QK_NORM: tuple[Row, ...] = (
    ("model.layers.{i}.self_attn.q_norm", "blocks.{i}.mixer.q_norm", "", "blk.{i}.attn_q_norm"),
    ("model.layers.{i}.self_attn.k_norm", "blocks.{i}.mixer.k_norm", "", "blk.{i}.attn_k_norm"),
)
# Files that are a tokenizer, or part of one.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
# Old files hold the rotation's rates, which follow from the config.
IGNORED = ".self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Family:
    """What has to be known of an architecture besides its config.

    `qkv_bias`, `qk_norm`: what its attention has. `must_be`: config keys with the only value that can be converted.
    `gguf_interleaved`: GGUF files hold the rows of q and k so that neighbors are rotated together.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    must_be: Mapping[str, Any] = field(default_factory=dict)
    gguf_interleaved: bool = False

    def weights(self, depth: int) -> dict[str, tuple[str, str]]:
        """Name in the file -> parameter of a `LanguageModel` of `depth` layers, and its part, empty for all of it."""
        found = {}
        for theirs, ours, part, _ in _in_layers((*MODULES, *(QK_NORM if self.qk_norm else ())), depth):
            for kind in ("weight", "bias") if self.qkv_bias and part in ("q", "k", "v") else ("weight",):
                found[f"{theirs}.{kind}"] = (f"{ours}.{kind}", part)
        return found


# By `model_type`, which for GGUF files is their architecture. SmolLM2 is a llama with tied embeddings.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(must_be={"attention_bias": False, "mlp_bias": False}, gguf_interleaved=True),
    "mistral": Family(gguf_interleaved=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, must_be={"attention_bias": False}),
}


def family_of(model_type: str, where: object) -> Family:
    """The family of `model_type`, which stands in `where`. Raises `ConfigError` listing those there are."""
    if model_type not in FAMILIES:
        raise ConfigError(f"source={where}: " + unknown_name("architecture", model_type, FAMILIES))
    return FAMILIES[model_type]


def gguf_names(depth: int) -> dict[str, str]:
    """GGUF's names of the tensors of `depth` layers -> those of a Hugging Face checkpoint."""
    rows = _in_layers((*MODULES, *QK_NORM), depth)
    return {f"{gguf}.{kind}": f"{theirs}.{kind}" for theirs, *_, gguf in rows for kind in ("weight", "bias")}


def _in_layers(rows: Iterable[Row], depth: int) -> Iterator[list[str]]:
    for row in rows:
        for i in range(depth if "{i}" in row[0] else 1):
            yield [name.replace("{i}", str(i)) for name in row]


@dataclass(frozen=True)
class Source:
    """A pretrained model: its config and its weights, not yet read. As it stands: a folder of safetensors files.

    `path`: folder or GGUF file. `config`: transformers' config of it. `files`: those that hold weights. `shapes`: of
    every tensor, by the name it has in a Hugging Face checkpoint. `rope_stretch`: factors on the rotation's
    wavelengths that are stored with the weights (GGUF); empty: those of the config. `interleaved`: the rows of q and k
    are ordered so that neighbors are rotated together (GGUF).
    """

    path: Path
    family: Family
    config: Any
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    rope_stretch: tuple[float, ...] = field(default=(), kw_only=True)
    interleaved: bool = field(default=False, kw_only=True)

    @property
    def quantized(self) -> str:
        """The format a file's matrices are quantized to, as `GGUF Q4_1`; empty where nothing was lost."""
        return ""

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None where there is none. Raises `ConfigError` for ids the model lacks."""
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

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, in the files' order; only one is held. Raises `CheckpointError`."""
        for file in self.files:
            with open_weights(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    yield name, shard.get_tensor(name)

    def sha256(self) -> str:
        """Of the weights: a file's own hash, or that of the lines `hash  name` of several (as sha256sum writes)."""
        hashes = [f"{sha256_of(file)}  {file.name}\n" for file in self.files]
        return hashes[0].split()[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class GGUFSource(Source):
    """A GGUF file (llama.cpp): its tensors are dequantized to float32, and have their Hugging Face names and rows."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        config = self.config
        names = gguf_names(config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for tensor in gguf.open_file(self.path).tensors:
            if tensor.name == ROTATION:
                continue
            name = names.get(tensor.name, tensor.name)
            value = gguf.dequantized(tensor)
            kind = name.split(".")[-2]
            if self.interleaved and kind in heads:
                # Rows 2i, 2i+1 of a head are the pair that i, i + K/2 are in a Hugging Face checkpoint.
                value = value.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
            yield name, value

    @property
    def quantized(self) -> str:
        kinds = Counter(
            tensor.tensor_type.name for tensor in gguf.open_file(self.path).tensors if len(tensor.shape) > 1
        )
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
    for shard in files:
        found = shapes_in(shard)
        if twice := sorted(shapes.keys() & found.keys()):
            raise CheckpointError(f"{shard}: holds {twice[0]}, which another file holds too")
        shapes |= found
    from transformers import AutoConfig

    options = {"local_files_only": True, "trust_remote_code": False}
    config = _config(folder, lambda: AutoConfig.from_pretrained(folder, **options))
    return Source(folder, family, config, files, shapes)


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

    config = _config(file, lambda: AutoConfig.for_model(architecture, **values))
    stretch = [factor for tensor in reader.tensors if tensor.name == ROTATION for factor in tensor.data.tolist()]
    names = gguf_names(config.num_hidden_layers)
    return GGUFSource(
        file,
        family,
        config,
        (file,),
        {names.get(name, name): shape for name, shape in shapes.items() if name != ROTATION},
        rope_stretch=tuple(stretch),
        interleaved=family.gguf_interleaved,
    )


def _config(where: Path, read: Callable[[], Any]) -> Any:
    """The transformers config that `read` gives."""
    try:
        return read()
    # What a config class thinks of its values comes as one of many types.
    except Exception as error:
        raise ConfigError(f"source={where}: its config can't be read: {_first_line(error)}") from None


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
