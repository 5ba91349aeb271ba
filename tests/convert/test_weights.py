"""A model read from a checkpoint computes what transformers computes, and nothing is left out on either side."""

import ctypes
import gc
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqtrain.config import compose_config
from seqtrain.convert.architecture import architecture_of, student_of
from seqtrain.convert.settings import read_convert_config
from seqtrain.convert.sources import open_source
from seqtrain.convert.weights import export, load_teacher, student_on
from seqtrain.errors import CheckpointError, SeqtrainError
from seqtrain.memory import AnonymousPeak
from seqtrain.models.pretrained import from_pretrained, load_weights, save_pretrained
from seqtrain.models.source import Source
from tests.command_cases import refused
from tests.convert.convert_cases import COMMON, FAMILIES, TINY, read_teacher, save_tokenizer, some_tokens, write_gguf


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens, all_logits=True)[0]


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_a_teacher_has_the_logits_of_its_source(transformers_on_disk, kind):
    """Norms, biases, free head widths, windows and rotations all count."""
    theirs, folder = transformers_on_disk(kind)
    tokens = some_tokens(2, 80)
    torch.testing.assert_close(logits_of(read_teacher(folder), tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_gguf_file_holds_the_same_model(transformers_on_disk, tmp_path, kind):
    theirs, _ = transformers_on_disk(kind)
    write_gguf(theirs, tmp_path / "model.gguf")
    tokens = some_tokens(1, 40)
    came = logits_of(read_teacher(tmp_path / "model.gguf"), tokens)
    torch.testing.assert_close(came, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_gguf_file_s_tokenizer_is_written_beside_the_model(transformers_on_disk, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    theirs, _ = transformers_on_disk("smollm2")
    write_gguf(theirs, tmp_path / "model.gguf")
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr(Source, "tokenizer", lambda self: tokenizer)
    save_pretrained(from_pretrained(tmp_path / "model.gguf"), tmp_path / "written")
    assert AutoTokenizer.from_pretrained(tmp_path / "written").get_vocab() == tokenizer.get_vocab()


def test_a_gguf_file_is_opened_once(transformers_on_disk, tmp_path, monkeypatch):
    """Its config, its format, its weights and the tokenizer that is written beside an export."""
    from seqtrain.models import gguf

    theirs, _ = transformers_on_disk("smollm2")
    write_gguf(theirs, tmp_path / "model.gguf", quantization="F16")
    opened, before = [], gguf.open_file
    monkeypatch.setattr(gguf, "open_file", lambda file: (opened.append(file), before(file))[1])
    config = read_convert_config(compose_config("convert", [f"source={tmp_path / 'model.gguf'}", "output_dir=unused"]))
    source = open_source(config.source)
    architecture = student_of(architecture_of(source), config, ())
    student = student_on(load_teacher(source, dtype=torch.float32), architecture, seed=0)
    assert source.tokenizer() is source.tokenizer()
    assert source.quantized == ""
    export(student, architecture, source, tmp_path / "exported")
    assert len(opened) == 1


@pytest.mark.parametrize(("quantization", "step"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 127)])
def test_gguf_weights_are_dequantized(transformers_on_disk, tmp_path, quantization, step):
    theirs, _ = transformers_on_disk("smollm2")
    write_gguf(theirs, tmp_path / "model.gguf", quantization=quantization)
    ours = read_teacher(tmp_path / "model.gguf").embedding.weight
    expected = theirs.model.embed_tokens.weight
    assert not torch.equal(ours, expected)
    # Half a step of the largest number in a row of 32, which is one block of Q8_0.
    assert ((ours - expected).abs() <= 0.51 * step * expected.abs().amax(1, keepdim=True) * 2).all()


def test_rotation_factors_in_gguf_files_are_used(transformers_on_disk, tmp_path):
    theirs, _ = transformers_on_disk("smollm2")
    write_gguf(theirs, tmp_path / "model.gguf", more={"rope_freqs.weight": np.array([1, 2, 4, 8], dtype=np.float32)})
    model = architecture_of(open_source(str(tmp_path / "model.gguf")))
    assert model.mixers["attention"].rope_stretch == (1, 2, 4, 8)


SCALED = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama-linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.finetuned": True}),
        ("llama-linear", {"rope.scale_linear": 2.0}),
        ("qwen2-yarn", SCALED),
        ("llama", SCALED | {"rope.scaling.type": "none"}),
        ("mistral-window", {"attention.sliding_window": 7}),
        ("llama", {"attention.sliding_window": 0, "expert_count": 0}),
    ],
)
@torch.no_grad()
def test_a_gguf_files_own_keys_decide(transformers_on_disk, tmp_path, kind, keys):
    """Rotation and windows are those the file names, and no others, whatever the model is called."""
    theirs, _ = transformers_on_disk(kind)
    write_gguf(theirs, tmp_path / "Mistral-7B.gguf", keys=keys)
    tokens = some_tokens(1, 80)
    came = logits_of(read_teacher(tmp_path / "Mistral-7B.gguf"), tokens)
    torch.testing.assert_close(came, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": {"rope.scaling.type": "longrope"}}, "llama.rope.scaling.type=longrope can't be converted"),
        ({"keys": {"rope.dimension_count": 4}}, "llama.rope.dimension_count=4 can't be converted; it must be 8"),
        ({"keys": {"attention.value_length": 4}}, "llama.attention.value_length=4 can't be converted; it must be 8"),
        ({"keys": {"rope.scaling.attn_factor": 1.5}}, "llama.rope.scaling.attn_factor=1.5 can't be converted"),
        (
            {"keys": {"attention.sliding_window_pattern": 2}},
            "sliding_window_pattern=2 can't be converted; the key is not",
        ),
        ({"keys": {"expert_count": 8}}, "llama.expert_count=8 can't be converted; it must be 0"),
        ({"leave_out": ["attention.head_count"]}, "lacks the key llama.attention.head_count"),
        (
            {"more": {"rope_freqs.weight": np.ones(4, np.float32)}, "keys": SCALED},
            "has rope_freqs beside rope_type=yarn",
        ),
    ],
)
def test_a_gguf_key_that_is_not_understood_is_refused(transformers_on_disk, tmp_path, changed, message):
    theirs, _ = transformers_on_disk("llama")
    write_gguf(theirs, tmp_path / "model.gguf", **changed)
    with refused(message):
        read_teacher(tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_dtype_asked_for_and_stay_tied(transformers_on_disk, dtype):
    _, folder = transformers_on_disk("smollm2")
    source = open_source(str(folder))
    model = architecture_of(source).build()
    load_weights(model, source, dtype=dtype)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.head.weight is model.embedding.weight


def sharded(folder, place):
    """A copy of the checkpoint in two files with an index."""
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for part, chosen in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in chosen}, place / f"part-{part}.safetensors")
        index |= dict.fromkeys(chosen, f"part-{part}.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return place


def test_shards_hold_the_same_model(transformers_on_disk, tmp_path):
    _, folder = transformers_on_disk("qwen2")
    tokens = some_tokens(1, 9)
    ours = logits_of(read_teacher(sharded(folder, tmp_path / "copy")), tokens)
    assert torch.equal(ours, logits_of(read_teacher(folder), tokens))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(name):
    return lambda folder: change_weights(folder, lambda weights: weights.pop(name))


def add(name, *shape):
    return lambda folder: change_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def set_config(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
# A head of eight channels has four factors.
SHORT = DYNAMIC | {"rope_type": "longrope", "original_max_position_embeddings": 9}
SHORT |= {key: [1.0, 2.0, 3.0] for key in ("long_factor", "short_factor")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (add("model.layers.0.extra", 2), "holds model.layers.0.extra, which its architecture does not have"),
        (add("model.norm.weight", 5), "model.norm.weight has shape (5,), expected (32,)"),
        (add("lm_head.weight", 61, 32), "lm_head.weight differs from the embedding the config ties it to"),
        (truncate, "model.safetensors: incomplete or corrupt safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
        (set_config(model_type="llamma"), "architecture 'llamma' is unknown; did you mean 'llama'?"),
        (set_config(hidden_act="tanh"), "hidden_act=tanh is not supported; silu, "),
        (set_config(mlp_bias=True), "lacks model.layers.0.mlp.down_proj.bias"),
        (set_config(num_key_value_heads=3), "num_key_value_heads=3 must divide num_attention_heads=4"),
        (set_config(num_hidden_layers=4), "lacks model.layers.3"),
        (set_config(quantization_config={"bits": 4}), "quantized weights"),
        (set_config(intermediate_size=41), "down_proj.weight has shape (32, 40), expected (32, 41)"),
        (
            set_config(rope_parameters=DYNAMIC | {"rope_type": "proportional"}),
            "rope_type=proportional is not supported",
        ),
        (set_config(rope_parameters=SHORT), "rope_type=longrope: The size of tensor"),
        (set_config(num_attention_heads=0), "config.json: num_attention_heads=0: must be a whole number from 1"),
        (set_config(head_dim=-4), "config.json: head_dim=-4: must be a whole number"),
        (set_config(head_dim=33), "requires an even rotary dimension, but got `head_dim`=33"),
        (set_config(hidden_size=10**18), "config.json: hidden_size=1000000000000000000: must be a whole number"),
        (set_config(num_hidden_layers=40_000), "num_hidden_layers=40000, but the weights are"),
        (set_config(rms_norm_eps=-1), "config.json: rms_norm_eps=-1: must be a finite number above 0"),
        (set_config(rope_parameters=DYNAMIC | {"rope_theta": 0}), "config.json: rope_theta=0: must be a finite"),
    ],
)
def test_a_damaged_source_is_one_line(transformers_on_disk, tmp_path, change, message):
    _, folder = transformers_on_disk("smollm2")
    shutil.copytree(folder, tmp_path / "copy")
    change(tmp_path / "copy")
    with refused(message, SeqtrainError):
        read_teacher(tmp_path / "copy")


def test_an_index_may_only_name_files_next_to_it(transformers_on_disk, tmp_path):
    _, folder = transformers_on_disk("qwen2")
    copy = sharded(folder, tmp_path / "copy")
    file = copy / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("part-0", "../part-0"))
    with pytest.raises(CheckpointError, match=r"names \.\./part-0\.safetensors, which is no file in"):
        open_source(str(copy))


def test_a_wrong_hash_is_refused(transformers_on_disk):
    _, folder = transformers_on_disk("llama")
    right = open_source(str(folder)).sha256()
    assert open_source(str(folder), right).sha256() == right
    with pytest.raises(CheckpointError, match=f"sha256 is {right}, but source_sha256=abc"):
        open_source(str(folder), "abc")


def test_a_damaged_gguf_file_is_one_line(transformers_on_disk, tmp_path):
    theirs, _ = transformers_on_disk("llama")
    file = tmp_path / "model.gguf"
    write_gguf(theirs, file)
    whole = file.read_bytes()
    for content in (whole[:-2000], whole[:50], b"GGML" + whole[4:], b""):
        file.write_bytes(content)
        with refused("model.gguf: ", SeqtrainError):
            read_teacher(file)


@pytest.mark.all
def test_the_student_is_all_that_is_held(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 20}
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, **sizes}))
    model.save_pretrained(tmp_path / "source", max_shard_size="16MB")
    del model
    shard = max(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    config = read_convert_config(compose_config("convert", [f"source={tmp_path / 'source'}", "output_dir=unused"]))
    source = open_source(config.source)
    # What is imported on first use is no part of a model.
    import seqtrain.models.huggingface  # noqa: F401

    gc.collect()
    # What was freed before must not be what is used now.
    ctypes.CDLL(None).malloc_trim(0)
    with AnonymousPeak() as peak:
        architecture = student_of(architecture_of(source), config, ())
        student = student_on(load_teacher(source, dtype=torch.bfloat16), architecture, seed=0)
        export(student, architecture, source, tmp_path / "model")
    held = sum(parameter.nbytes for parameter in student.parameters())
    assert held > 25 * 2**20
    assert shard < 0.6 * held
    assert 0.9 * held < peak.bytes < held + shard
