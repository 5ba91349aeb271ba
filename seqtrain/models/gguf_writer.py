"""A Hugging Face folder of a Granite hybrid as a GGUF file (llama.cpp), a tensor at a time.

Names, keys and the library's enumerations are those of `gguf`; what llama.cpp wants otherwise than transformers: rows
of q and k with neighbors rotated together, a decay's rate in place of its logarithm, an MLP's gate and up apart.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from seqtrain.errors import ConfigError
from seqtrain.files import replacing
from seqtrain.models.source import Source

Kind = Literal["f32", "f16", "bf16", "q8_0"]
FAMILY = "granitemoehybrid"
# Multiplied by others in float32 there.
PLAIN = ("conv1d", "norm", "layernorm")
# Types of tokens: an ordinary one, one that is never text, one that stands for itself, none.
NORMAL, CONTROL, OWN, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Part:
    """A tensor of a GGUF file. `theirs`: whose rows it is made of; `made`: how; `shape`: what comes out."""

    name: str
    theirs: str
    made: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


def check_writable(source_type: str, config: Any, where: str) -> None:
    """Raises `ConfigError` that begins with `where` for a model that no GGUF file can hold here."""
    if source_type != FAMILY:
        raise ConfigError(f"{where}: only {FAMILY} is written as GGUF, not {source_type}; use target={FAMILY}")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"{where}: rope_type={kind} can't be written as GGUF")
    if config.num_local_experts:
        raise ConfigError(f"{where}: num_local_experts={config.num_local_experts}: experts can't be written as GGUF")
    if config.mamba_proj_bias:
        raise ConfigError(f"{where}: mamba_proj_bias=true: llama.cpp has no biases of recurrent projections")


def write_gguf(source: Source, file: Path, *, kind: Kind = "f32", vocabulary: Any = None) -> None:
    """Writes the model of a folder to `file`, whole or not at all.

    `kind`: number format of matrices; vectors are float32. `vocabulary`: `gguf`'s reader of the file whose
    tokenizer it is; None: that of the folder. Raises `ConfigError`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    config = source.config
    check_writable(config.model_type, config, f"source={source.path}")
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    with replacing(file) as unfinished:
        writer = GGUFWriter(unfinished, "granitehybrid")
        writer.add_file_type(LlamaFileType[types[kind]])
        _write_keys(writer, config)
        if vocabulary is None:
            _write_vocabulary(writer, source)
        else:
            _copy_vocabulary(writer, vocabulary)
        parts = list(_parts(source))
        chosen = [_type_of(part, GGMLQuantizationType[kind.upper()]) for part in parts]
        for part, each in zip(parts, chosen, strict=True):
            shape = quants.quant_shape_to_byte_shape(part.shape, each) if _packed(each) else part.shape
            dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(each.name, np.uint8))
            writer.add_tensor_info(part.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=each)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        read = source.reader()
        for part, each in zip(parts, chosen, strict=True):
            values = part.made(read(part.theirs).float()).contiguous().numpy()
            writer.write_tensor_data(quants.quantize(values, each))
        writer.close()


def _packed(kind: Any) -> bool:
    """Whether numbers are bytes of a format numpy lacks."""
    return kind.name not in ("F32", "F16")


def _type_of(part: Part, wanted: Any) -> Any:
    """The format of a tensor: vectors, norms and convolutions are float32, and what can't be packed float16."""
    from gguf import GGML_QUANT_SIZES

    plain = len(part.shape) < 2 or 1 in part.shape or part.theirs.split(".")[-2].endswith(PLAIN)
    if plain:
        return type(wanted).F32
    return wanted if part.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else type(wanted).F16


def _write_keys(writer: Any, config: Any) -> None:
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    key = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(depth)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.shared_intermediate_size)
    writer.add_head_count(heads)
    # A layer without key heads is a recurrent one.
    kept = [kind == "full_attention" for kind in config.layer_types]
    writer.add_head_count_kv([config.num_key_value_heads if each else 0 for each in kept])
    writer.add_key_length(key)
    writer.add_value_length(key)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(key)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    # By this llama.cpp knows whether this family's attention is rotated at all.
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)


def _parts(source: Source) -> Iterator[Part]:
    """Every tensor, in the file's order. Raises `ConfigError` for one that llama.cpp has no name for."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = source.config
    names = get_tensor_name_map(MODEL_ARCH.GRANITE_HYBRID, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for theirs, shape in source.shapes.items():
        for called, made, size in _made(theirs, shape, heads, config.mamba_n_groups):
            name = names.get_name(called, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ConfigError(f"source={source.path}: {theirs} has no place in a GGUF file")
            yield Part(name, theirs, made, size)


def _made(
    theirs: str, shape: tuple[int, ...], heads: dict[str, int], groups: int
) -> Iterator[tuple[str, Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """For each part of a tensor the name `gguf` knows it by, how it is made, and its shape."""
    stem, _, kind = theirs.rpartition(".")
    layer, _, module = stem.rpartition(".")
    if module in heads:
        yield theirs, partial(_neighbors, heads=heads[module]), shape
    elif stem.endswith("shared_mlp.input_linear"):
        half = shape[0] // 2
        for name, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None))):
            place = f"{layer.removesuffix('.shared_mlp')}.feed_forward.{name}.{kind}"
            yield place, partial(_rows, rows=rows), (half, *shape[1:])
    elif stem.endswith("shared_mlp.output_linear"):
        yield theirs.replace("shared_mlp.output_linear", "feed_forward.down_proj"), _same, shape
    elif kind == "dt_bias":
        yield f"{stem}.dt_proj.bias", _same, shape
    elif kind in ("A_log", "D"):
        yield theirs, _rate if kind == "A_log" else _column, (*shape, 1)
    elif stem.endswith("mamba.conv1d") and kind == "weight":
        yield theirs, partial(torch.squeeze, dim=1), (shape[0], shape[2])
    elif stem.endswith("mamba.norm"):
        # llama.cpp normalises group by group.
        yield theirs, partial(_grouped, groups=groups), (groups, shape[0] // groups)
    else:
        yield theirs, _same, shape


def _same(value: Tensor) -> Tensor:
    return value


def _rows(value: Tensor, rows: slice) -> Tensor:
    return value[rows]


def _column(value: Tensor) -> Tensor:
    return value[:, None]


def _rate(value: Tensor) -> Tensor:
    return -value.exp()[:, None]


def _grouped(value: Tensor, groups: int) -> Tensor:
    return value.unflatten(0, (groups, -1))


def _neighbors(value: Tensor, heads: int) -> Tensor:
    """Rows i and i + K/2 of a head, which transformers rotates together, as neighbors."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write_vocabulary(writer: Any, source: Source) -> None:
    """The folder's tokenizer, a byte-level BPE; none where it has none. Raises `ConfigError` for another kind."""
    from gguf import SpecialVocab

    tokenizer = source.tokenizer()
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    if values["model"]["type"] != "BPE":
        kind = values["model"]["type"]
        raise ConfigError(f"source={source.path}: its tokenizer is a {kind} model; only BPE is written as GGUF")
    added = {token["id"]: token for token in values["added_tokens"]}
    words = {number: word for word, number in values["model"]["vocab"].items()} | {
        number: token["content"] for number, token in added.items()
    }
    size = source.config.vocab_size
    kinds = [
        UNUSED
        if number not in words
        else NORMAL
        if number not in added
        else CONTROL
        if added[number]["special"]
        else OWN
        for number in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(values["pre_tokenizer"], source.path))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    SpecialVocab(source.path, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(values: dict[str, Any] | None, where: Path) -> str:
    """llama.cpp's name of the rule that cuts text into words. Raises `ConfigError` for one it isn't known for."""
    steps: Sequence[dict[str, Any]] = (
        [values] if values and "pretokenizers" not in values else (values or {}).get("pretokenizers", [])
    )
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    pattern = str(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else ""
    if r"\p{N}{1,3}" in pattern:
        return "llama-bpe"
    if r"\p{N}|" in pattern:
        return "qwen2"
    raise ConfigError(
        f"{where}: how its tokenizer cuts text ({', '.join(kinds) or 'not at all'}) has no name in GGUF files"
    )


def _copy_vocabulary(writer: Any, opened: Any) -> None:
    """The tokenizer of another GGUF file, key by key."""
    from gguf import GGUFValueType

    for name, field in opened.fields.items():
        if name.startswith("tokenizer."):
            kind, *inner = field.types
            sub = inner[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
