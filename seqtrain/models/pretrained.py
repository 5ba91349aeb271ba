"""Other people's models: a Hugging Face folder of a supported family as a `LanguageModel`, and back."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import replacing
from seqtrain.initialization import Fill, materialize_all
from seqtrain.mixers import Mixer
from seqtrain.models.architecture import Architecture
from seqtrain.models.families import Family, Piece, family_of
from seqtrain.models.families.base import for_rows
from seqtrain.models.language_model import LanguageModel
from seqtrain.models.source import INDEX, Source, open_source
from seqtrain.weights import REAL, check_finite, open_weights

# Files of the tokenizer and of generation, copied as they are.
CARRIED = (
    "tokenizer*.*", "*_tokens*.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    "additional_chat_templates/*", "generation_config.json",
)  # fmt: skip
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
# What modules hold that is no part of the network.
APART = ("training", "chunk")


@dataclass(frozen=True)
class Origin:
    """What exporting a model needs besides its weights.

    `config`: the folder's config.json. `shapes`, `dtypes` (None where quantized), `files`: of each tensor, by its name.
    `source`: the folder or GGUF file, None for a model made here. A GGUF file's model is written as the Hugging Face
    folder it could have come from.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | None]
    files: Mapping[str, str]
    source: Path | None


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    tokens: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> LanguageModel:
    """The model of a Hugging Face folder, or of a GGUF file, in evaluation mode.

    `dtype`: of all weights; None: each as it is stored. `tokens`: length of the rows it will read, on which LongRoPE
    and dynamic rotations depend; None: the longest it was made for. `progress` is told the tensors' names. Raises
    `ConfigError` for a model of no supported family, `CheckpointError` for files that are damaged or are not those of
    its config.
    """
    source = open_source(str(folder))
    model = architecture_of(source, tokens).build()
    load_weights(model, source, dtype=dtype, progress=progress)
    model.origin = origin_of(source)
    return model.eval()


def save_pretrained(model: LanguageModel, folder: str | Path) -> None:
    """Writes `model`, which came from `from_pretrained`, as the Hugging Face type it was, whole or not at all.

    Config, tensors' names, dtypes and files are those it came with, and so are tokenizer, chat template, generation
    config and what the family's own class ignores. Raises `ConfigError` where `folder` exists or the model is not of a
    family.
    """
    if model.origin is None:
        raise ConfigError("save_pretrained: this model did not come from from_pretrained; tools/export.py exports runs")
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        write_folder(model, model.origin, unfinished)


def export_as(model: LanguageModel, model_type: str, folder: Path, **tokens: Any) -> None:
    """Writes `model`, whatever made it, into the empty `folder` as the Hugging Face type `model_type`.

    `tokens`: as `origin_as` has them. Raises `ConfigError` naming what that type has otherwise, where the model does
    not fit.
    """
    write_folder(model, origin_as(model, model_type, **tokens), folder)


def origin_as(
    model: LanguageModel,
    model_type: str,
    *,
    key: str = "as",
    rope: Mapping[str, Any] = MappingProxyType({}),
    **tokens: Any,
) -> Origin:
    """What writing `model`, whatever made it, as the Hugging Face type `model_type` needs.

    `rope`: what the config says of a rotation that the layers' own configs don't tell. `tokens`: what else it says:
    special tokens, lengths. The model may be without memory. Raises `ConfigError`, which begins with `key`, naming what
    that type has otherwise, where the model does not fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = f"{key}={model_type}"
    family = family_of(model_type, where)
    try:
        keys = family.config_of(model) | tokens
        if rope:
            keys["rope_parameters"] = keys.get("rope_parameters", {}) | dict(rope)
        config = AutoConfig.for_model(model_type, **keys)
        found = family.architecture(family.text_config(config), where).build()
    # What a config class thinks of its values comes as one of many types.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: the model can't be exported as one: {reason}") from None
    if wrong := differences(model, found):
        raise ConfigError(f"{where}: the model can't be exported as one: {'; '.join(wrong[:4])}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = by_tensor(family.pieces(family.text_config(config), model))
    if model.config.tie_embeddings:
        del places[HEAD]
    shapes = {name: shape_of(pieces, parameters) for name, pieces in places.items()}
    dtype = model.embedding.weight.dtype
    named = {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]], "dtype": str(dtype).split(".")[-1]}
    kinds = dict.fromkeys(shapes, dtype)
    return Origin(config.to_dict() | named, shapes, kinds, dict.fromkeys(shapes, WEIGHTS), None)


def differences(model: LanguageModel, found: LanguageModel) -> list[str]:
    """What a layer of `model` has and the same layer of `found` has otherwise, in the words of their modules."""
    wrong = []
    for name in ("width", "norm_zero_centered", "embedding_scale", "residual_scale", "logit_scale", "logit_cap"):
        ours, theirs = (getattr(each.config, name) for each in (model, found))
        if ours != theirs:
            wrong.append(f"model.{name}={ours}, not {theirs}")
    ours, theirs = (dict(each.named_modules()) for each in (model, found))
    for name in sorted(ours.keys() | theirs.keys()):
        mine, its = (_traits(each.get(name)) for each in (ours, theirs))
        if mine != its:
            wrong.append(f"{name or 'the model'} has {_said(mine, its)}, not {_said(its, mine)}")
    return wrong


def _traits(module: nn.Module | None) -> dict[str, Any]:
    """What a module computes with, but for its weights' numbers and what only its children have."""
    if module is None:
        return {"module": "none"}
    plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | bool | tuple)}
    found = {"module": type(module).__name__} | {key: value for key, value in plain.items() if key not in APART}
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    options = {}
    if isinstance(module, Mixer):
        # Those that are no sizes, which the shapes of weights tell.
        sizes = ("expand", "head", "width", "group", "heads")
        options = {key: value for key, value in asdict(module.config).items() if not any(x in key for x in sizes)}
        rotated = getattr(module.config, "rope_width", None)
        options |= {"rope_width": getattr(module, "key", 0) if rotated is None else rotated}
    return found | shapes | options


def _said(mine: Mapping[str, Any], its: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in mine.items() if its.get(key) != value) or "nothing else"


def architecture_of(source: Source, tokens: int | None = None) -> Architecture:
    """The network of a source for rows of `tokens`, see `for_rows`. Raises `ConfigError` for what is not supported."""
    found = source.family.architecture(for_rows(source.config, tokens), source.path)
    if not source.rope_stretch:
        return found
    mixers = {}
    for name, mixer in found.mixers.items():
        if mixer.rope_stretch:
            kind = source.config.rope_parameters.get("rope_type")
            raise ConfigError(f"source={source.path}: has rope_freqs beside rope_type={kind}; one of both is supported")
        mixers[name] = replace(mixer, rope_stretch=source.rope_stretch)
    return replace(found, mixers=mixers)


def load_weights(
    model: LanguageModel,
    source: Source,
    *,
    dtype: torch.dtype | None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Gives `model`, built on the meta device, memory and the source's weights; `dtype` None: as they are stored.

    Parameters the source does not have (those of a replaced layer) begin as those of a new model, from `seed`. Peak
    memory: the model and one tensor. Raises `CheckpointError` for a tensor that is missing, unknown, or has another
    shape than the model's.
    """
    fill = source_weights(model, source, model.initial_weights(seed), progress=progress)
    stored = {piece.ours: source.dtype(name) for name, pieces in places_of(model, source).items() for piece in pieces}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype or stored.get(name, torch.float32))
    materialize_all(model, fill, torch.device("cpu"))


def source_weights(
    model: LanguageModel, source: Source, otherwise: Fill, *, progress: Callable[[str], None] = lambda name: None
) -> Fill:
    """Gives a parameter of `model` the source's numbers, tensor by tensor, or what the source lacks `otherwise`.

    Raises `CheckpointError` as `load_weights` does.
    """
    names: dict[Tensor, str] = {}
    ours = {name: names.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}
    pieces: dict[str, list[tuple[str, Piece]]] = {}
    for theirs, parts in places_of(model, source).items():
        if theirs != HEAD or not model.config.tie_embeddings:
            for piece in parts:
                pieces.setdefault(ours[piece.ours], []).append((theirs, piece))
    where, read, tied = f"source={source.path}", source.reader(), model.config.tie_embeddings and HEAD in source.shapes

    def fill(name: str, whole: Tensor, own: slice) -> None:
        if name not in pieces:
            otherwise(name, whole, own)
            return
        # What no tensor fills shall be seen.
        whole.fill_(torch.nan)
        for theirs, piece in pieces[name]:
            source.dtype(theirs)
            progress(theirs)
            piece.write(whole, read(theirs))
            check_finite(where, theirs, piece.part_of(whole))
        if tied and name == ours["embedding.weight"] and not torch.equal(whole, read(HEAD).to(whole)):
            raise CheckpointError(f"{where}: lm_head.weight differs from the embedding the config ties it to")

    return fill


def places_of(model: LanguageModel, source: Source) -> dict[str, list[Piece]]:
    """Where each named tensor of the source belongs.

    Raises `CheckpointError` unless the source's tensors are those of the family, in the model's shapes.
    """
    family = source.family
    names = {family.canonical(x): x for x in source.shapes}
    shapes = {known: source.shapes[name] for known, name in names.items()}
    places = family.fitted(by_tensor(family.pieces(source.config, model)), shapes)
    optional = {HEAD} if model.config.tie_embeddings else set()
    if missing := sorted(set(places) - set(names) - optional):
        raise CheckpointError(f"source={source.path}: lacks {_some(missing)}")
    if unknown := [name for known, name in names.items() if known not in places and not is_extra(family, name)]:
        what = f"holds {_some(sorted(unknown))}, which its architecture does not have"
        raise CheckpointError(f"source={source.path}: {what}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: places[known] for known, name in names.items() if known in places}
    for name, pieces in found.items():
        if source.shapes[name] != (expected := shape_of(pieces, parameters)):
            raise CheckpointError(f"source={source.path}: {name} has shape {source.shapes[name]}, expected {expected}")
    return found


def by_tensor(pieces: Iterator[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each of the file's tensors."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.theirs, []).append(piece)
    return found


def shape_of(pieces: list[Piece], parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the file's tensor that `pieces` make up."""
    parts = [piece.part_of(parameters[piece.ours]).shape for piece in pieces]
    return (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else tuple(parts[0])


def is_extra(family: Family, name: str) -> bool:
    """Whether a tensor is none of the network's, and known for that."""
    return name.startswith(family.carried) or name.endswith(family.ignored)


def origin_of(source: Source) -> Origin:
    """What exporting the source's model needs."""
    if not source.path.is_dir():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = source.config.to_dict()
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
        return Origin(config, source.shapes, dict.fromkeys(source.shapes, torch.float32), source.places, source.path)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    return Origin(
        config, source.shapes, {name: REAL.get(kind) for name, kind in source.kinds.items()}, source.places, source.path
    )


def write_folder(model: LanguageModel, origin: Origin, folder: Path) -> None:
    """Writes config, weights and what is carried along into `folder`, which is empty."""
    (folder / "config.json").write_text(json.dumps(origin.config, indent=2) + "\n", encoding="utf-8")
    places = places_in(model, origin)
    for file in sorted(set(origin.files.values())):
        names = [name for name, place in origin.files.items() if place == file]
        save_file(_tensors(model, origin, places, names), folder / file, metadata={"format": "pt"})
    if set(origin.files.values()) != {WEIGHTS}:
        sizes = sum((folder / file).stat().st_size for file in set(origin.files.values()))
        index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(origin.files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if origin.source is not None:
        copy_companions(origin.source, folder)


@torch.no_grad()
def _tensors(
    model: LanguageModel, origin: Origin, places: Mapping[str, list[Piece]], names: list[str]
) -> dict[str, Tensor]:
    """The tensors `names` of a file: of the model's parameters, or else of the folder it came from."""
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), {}
    for name in names:
        if pieces := places.get(name):
            value = torch.empty(shape_of(pieces, parameters), dtype=origin.dtypes[name])
            for piece in pieces:
                piece.read(parameters[piece.ours], value)
            found[name] = value
    if rest := set(names) - set(found):
        found |= _carried(origin, rest)
    return found


def _carried(origin: Origin, names: set[str]) -> dict[str, Tensor]:
    """Tensors that are not the model's, as they were."""
    found: dict[str, Tensor] = {}
    example = min(names)
    for file in sorted({origin.files[name] for name in names}):
        path = None if origin.source is None else origin.source / file
        if path is None or not path.is_file():
            raise CheckpointError(f"{path}: is gone, and with it {example}, which the export has to carry along")
        with open_weights(path) as opened:
            found |= {name: opened.get_tensor(name) for name in names if origin.files[name] == file}
    return found


def places_in(model: LanguageModel, origin: Origin) -> dict[str, list[Piece]]:
    """The pieces of each tensor of the files that `model` came from, by its name there."""
    family, config = family_of_config(origin.config)
    shapes = {family.canonical(name): shape for name, shape in origin.shapes.items()}
    places = family.fitted(by_tensor(family.pieces(config, model)), shapes)
    return {name: places[known] for name in origin.shapes if (known := family.canonical(name)) in places}


def family_of_config(config: Mapping[str, Any]) -> tuple[Family, Any]:
    """The family and transformers' config of a config.json's object."""
    from transformers import AutoConfig

    family = family_of(str(config["model_type"]), "config.json")

    def read(value: dict[str, Any]) -> Any:
        """Floats that JSON lacks are written as objects."""
        return float(value["__float__"]) if set(value) == {"__float__"} else value

    whole = AutoConfig.for_model(**json.loads(json.dumps(dict(config)), object_hook=read))
    return family, family.text_config(whole)


def copy_companions(path: Path, folder: Path, source: Source | None = None) -> None:
    """Copies tokenizer, chat template and generation config of a folder, or writes the tokenizer of a GGUF file.

    `source`: what is open at `path`, if anything is.
    """
    if not path.is_dir():
        if (tokenizer := (source or open_source(str(path))).tokenizer()) is not None:
            tokenizer.save_pretrained(folder)
        return
    for file in {found for pattern in CARRIED for found in path.glob(pattern) if found.is_file()}:
        copy = folder / file.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
