"""A Granite hybrid as a GGUF file: every tensor and key as llama.cpp reads them, and its tokenizer."""

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.models.gguf import dequantized, open_file
from seqtrain.models.gguf_writer import write_gguf
from seqtrain.models.source import open_source
from tests.command_cases import refused
from tests.models.family_cases import make

# Two heads and a key head of 8 channels, rotated; as a conversion leaves a model.
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
    "position_embedding_type": "rope",
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    "attention_bias": True,
    "mamba_proj_bias": False,
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """The model and its folder."""
    folder = tmp_path_factory.mktemp("granite")
    model = make("granite_dense", **HYBRID)
    model.save_pretrained(folder)
    return model, folder


def read(file):
    """Every tensor by name, dequantized, and every key."""
    reader = open_file(file)
    return (
        {tensor.name: dequantized(tensor) for tensor in reader.tensors},
        {name: field.contents() for name, field in reader.fields.items()},
    )


def expected_tensors(model):
    """What llama.cpp's own converter makes of each, said once more from the other end."""
    config, found = model.config, {}
    groups = config.mamba_n_groups
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    plain = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mamba.in_proj": "ssm_in", "mamba.out_proj": "ssm_out",
        "shared_mlp.output_linear": "ffn_down",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem in whole:
            found[f"{whole[stem]}.{kind}"] = value
            continue
        _, _, layer, *rest = stem.split(".")
        part = ".".join(rest)
        place = f"blk.{layer}."
        if part in plain:
            found[f"{place}{plain[part]}.{kind}"] = value
        elif part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            one = value.reshape(heads, 2, -1, *value.shape[1:])
            pairs = torch.stack([one[:, 0], one[:, 1]], 2).reshape(value.shape)
            found[f"{place}attn_{part[10]}.{kind}"] = pairs
        elif part == "shared_mlp.input_linear":
            found[f"{place}ffn_gate.{kind}"], found[f"{place}ffn_up.{kind}"] = value.chunk(2)
        elif part == "mamba.conv1d":
            found[f"{place}ssm_conv1d.{kind}"] = value[:, 0] if kind == "weight" else value
        elif part == "mamba.norm":
            found[f"{place}ssm_norm.{kind}"] = value.reshape(groups, -1)
        elif kind == "A_log":
            found[f"{place}ssm_a"] = -value.exp()[:, None]
        elif kind == "D":
            found[f"{place}ssm_d"] = value[:, None]
        else:
            assert kind == "dt_bias", name
            found[f"{place}ssm_dt.bias"] = value
    return found


def test_every_tensor_is_read_back(hybrid, tmp_path):
    model, folder = hybrid
    write_gguf(open_source(str(folder)), tmp_path / "model.gguf")
    came, keys = read(tmp_path / "model.gguf")
    expected = expected_tensors(model)
    assert came.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(came[name], value), name
    config = model.config
    assert keys["general.architecture"] == "granitehybrid"
    own = {name.removeprefix("granitehybrid."): value for name, value in keys.items()}
    assert own["attention.head_count_kv"] == [0, config.num_key_value_heads, 0, config.num_key_value_heads]
    assert own["rope.scaling.finetuned"] is True
    assert own["attention.scale"] == pytest.approx(0.3)
    assert own["logit_scale"] == pytest.approx(2.0)
    assert own["ssm.inner_size"] == config.mamba_expand * config.hidden_size
    assert own["ssm.time_step_rank"] == config.mamba_n_heads
    assert (own["ssm.state_size"], own["ssm.group_count"]) == (config.mamba_d_state, config.mamba_n_groups)
    assert keys["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize(("kind", "step"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_matrices_are_packed_and_vectors_are_not(hybrid, tmp_path, kind, step):
    model, folder = hybrid
    write_gguf(open_source(str(folder)), tmp_path / "model.gguf", kind=kind)
    came, _ = read(tmp_path / "model.gguf")
    packed = 0
    for name, value in expected_tensors(model).items():
        if torch.equal(came[name], value):
            assert value.dim() == 1 or 1 in value.shape or "norm" in name or "conv" in name, name
        else:
            packed += 1
            largest = value.abs().amax(-1, keepdim=True)
            assert ((came[name] - value).abs() <= 1.02 * step * largest).all(), name
    assert packed > 10


WORDS = ["<s>", "</s>", *map(chr, range(97, 97 + 26)), "ab", "Ġ"]


def save_with_words(model, folder):
    """The model with a tokenizer whose rule llama.cpp knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)


@pytest.mark.full
def test_llama_cpp_goes_on_with_the_same_tokens(hybrid, tmp_path):
    """Greedily, from token ids; extra `llama`."""
    xllamacpp = pytest.importorskip("xllamacpp")
    model, _ = hybrid
    save_with_words(model, tmp_path / "model")
    write_gguf(open_source(str(tmp_path / "model")), tmp_path / "model.gguf")
    prompt = [3, 9, 17, 5, 11, 22, 8]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "model.gguf")
    params.n_ctx, params.n_gpu_layers, params.warmup = 64, 0, False
    params.cpuparams.n_threads = 1
    asked = {"prompt": prompt, "n_predict": 12, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
    found = xllamacpp.Server(params).handle_completions(asked)
    tokens = [token["id"] for token in found["choices"][0]["logprobs"]["content"]]
    assert tokens == expected[0, len(prompt) :].tolist()


def test_the_vocabulary_is_that_of_the_folder_or_of_another_file(hybrid, tmp_path):
    model, folder = hybrid
    words, with_words = WORDS, tmp_path / "with"
    save_with_words(model, with_words)
    write_gguf(open_source(str(with_words)), tmp_path / "first.gguf")
    _, keys = read(tmp_path / "first.gguf")
    tokens = keys["tokenizer.ggml.tokens"]
    assert tokens[: len(words)] == words
    assert len(tokens) == model.config.vocab_size
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.merges"] == ["a b"]
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.eos_token_id"]) == ("smollm", 1)
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    write_gguf(open_source(str(folder)), tmp_path / "second.gguf", vocabulary=open_file(tmp_path / "first.gguf"))
    _, again = read(tmp_path / "second.gguf")
    assert {k: v for k, v in again.items() if "tokenizer" in k} == {k: v for k, v in keys.items() if "tokenizer" in k}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bamba", {}, "only granitemoehybrid is written as GGUF, not bamba"),
        ("granitemoehybrid", {}, "experts can't be written as GGUF"),
        ("granite_dense", {}, "mamba_proj_bias=true: llama.cpp has no biases of recurrent projections"),
        (
            "granite_dense",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=linear can't be written as GGUF",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_one_line(tmp_path, name, options, message):
    make(name, **options).save_pretrained(tmp_path / "model")
    with refused(message, ConfigError):
        write_gguf(open_source(str(tmp_path / "model")), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
