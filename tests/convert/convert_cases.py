"""Tiny random Transformers of every family, saved as Hugging Face saves them."""

import numpy as np
import torch

from seqtrain.convert.architecture import architecture_of
from seqtrain.convert.sources import open_source
from seqtrain.models.families import family_of
from seqtrain.models.gguf import hf_names
from seqtrain.models.pretrained import load_weights

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# Every family, and every option of its config that changes what its attention computes.
TINY = {
    "llama": ("Llama", {}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 12, "num_key_value_heads": 1}),
    "qwen3-square": ("Qwen3", {"head_dim": 8}),
    "phi3": ("Phi3", {"pad_token_id": None}),
}
FAMILIES = ("llama", "smollm2", "mistral", "qwen2", "qwen3")


def make_transformer(kind):
    """A tiny Transformer whose norms and biases are no identities either."""
    import transformers

    name, options = TINY[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def read_teacher(path):
    """The source at `path` as our own model."""
    source = open_source(str(path))
    model = architecture_of(source).build()
    load_weights(model, source, dtype=torch.float32)
    return model.eval()


def some_tokens(*shape, seed=1):
    return torch.randint(3, COMMON["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def save_tokenizer(folder, *, chat_template=None):
    """A tokenizer of letters in the form of Hugging Face."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(97, 97 + 26)), *" .,_()#:=\n\"'", *"0123456789"]
    assert len(letters) <= COMMON["vocab_size"]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def write_gguf(model, file, *, quantization="F32", more=None, keys=None, leave_out=()):
    """`model`, a transformers one, as llama.cpp writes it: its names, llamas' q and k with neighbors rotated.

    `more`: further tensors; `keys`: further keys behind the architecture's name; `leave_out`: keys that are not there.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = model.config
    # llama.cpp calls a mistral a llama.
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    for key, value in (keys or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        writer.kv_data[0].pop(f"{kind}.{key}", None)
        kinds[type(value)](f"{kind}.{key}", value)
    for key in leave_out:
        del writer.kv_data[0][f"{kind}.{key}"]
    names = {theirs: ours for ours, theirs in hf_names(config.num_hidden_layers).items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        if family_of(kind, file).gguf_interleaved and part in heads:
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        values = tensor.float().numpy()
        # Blocks of 32 must fill a row; llama.cpp too leaves the rest at F32.
        chosen = GGMLQuantizationType[quantization if values.ndim == 2 and values.shape[1] % 32 == 0 else "F32"]
        if chosen == GGMLQuantizationType.F32:
            writer.add_tensor(names[name], np.ascontiguousarray(values))
        else:
            writer.add_tensor(names[name], quants.quantize(values, chosen), raw_dtype=chosen)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
