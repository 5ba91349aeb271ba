"""The Hugging Face face: saved and loaded, padded and packed, generating from the recurrent cache."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TextStreamer

from seqtrain.errors import CheckpointError, SeqtrainError
from seqtrain.mixers import MIXERS
from seqtrain.models import ModelConfig, generate
from seqtrain.models.huggingface import SeqtrainForCausalLM
from seqtrain.models.huggingface_config import SeqtrainConfig
from seqtrain.testing import relative_error

VOCAB, PAD = 61, 0
# One of each kind of state: growing, windowed, with sinks, recurrent alone, and Liger's mixture.
LAYERS = ("attention", "sliding_attention", "linearized_attention", "gated_delta_net", "liger_gla")
FIELDS = {
    "attention": {"query_group": 2},
    "sliding_attention": {"window": 6},
    "linearized_attention": {"memory": "kda", "window": 5, "sinks": 2, "query_group": 2, "memory_weight": 0.5},
    "gated_delta_net": {},
    "liger_gla": {"window": 4},
}


def build(*, tied=True, layers=LAYERS):
    torch.manual_seed(2)
    mixers = {name: MIXERS.get(name).Config(**FIELDS[name]) for name in layers}
    shape = {"depth": len(layers), "width": 32, "heads": 4, "initializer_range": 0.1}
    model = ModelConfig(layers=layers, tie_embeddings=tied, **shape)
    config = SeqtrainConfig.of(model, mixers, VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=None)
    return SeqtrainForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    model.save_pretrained(place)
    return place


def some_tokens(*shape, seed=1):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = [some_tokens(length, seed=length) for length in (3, 17, 9)]


def padded():
    """The prompts as one batch, padded in front, and its mask."""
    rows, mask = torch.full((3, 17), PAD), torch.zeros(3, 17, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        rows[row, 17 - len(prompt) :] = prompt
        mask[row, 17 - len(prompt) :] = 1
    return rows, mask


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path, tied):
    """The tied head stays tied, in the file too, and nothing is left to unsaved buffers."""
    model, tokens = build(tied=tied), some_tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert (again.model.head.weight is again.model.embedding.weight) == tied
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("model.head.weight" in set(file.keys())) != tied
    assert list(model.buffers()) == []


@pytest.mark.all
def test_importing_seqtrain_after_transformers_is_enough_too(folder):
    code = (
        "import transformers.models.auto.modeling_auto, seqtrain; from transformers import AutoModelForCausalLM; "
        f"print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert result.stdout.strip() == "SeqtrainForCausalLM", result.stderr


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 50])
@torch.no_grad()
def test_resized_embeddings_are_saved_and_loaded(tmp_path, tied, size):
    """New rows are as those of a new model, and those that stay as they were."""
    model, tokens = build(tied=tied), some_tokens(2, 20) % 50
    kept, before = min(size, VOCAB), model(tokens).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.model.vocab_size, again.config.vocab_size) == (size, size)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert relative_error(model(tokens).logits[..., :kept], before[..., :kept]) < 1e-6
    for weight in (model.model.embedding.weight, model.model.head.weight):
        assert weight.shape == (size, 32)
        assert size < VOCAB or 0.07 < weight[VOCAB:].std() < 0.13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_loads_and_generates(model, folder, dtype):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens = some_tokens(1, 20)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert relative_error(half(tokens).logits, model(tokens).logits) < 0.05
    assert half.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 24)


@torch.no_grad()
def test_a_padded_batch_generates_what_its_rows_do(model):
    tokens, mask = padded()
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 17:]
    for row, prompt in enumerate(PROMPTS):
        ours = generate(model.model, prompt[None], max_new_tokens=12, temperature=0)
        assert batch[row].tolist() == ours[0].tolist()
        uncached = model.generate(prompt[None], max_new_tokens=12, do_sample=False, use_cache=False)
        assert uncached[0, len(prompt) :].tolist() == ours[0].tolist()


@torch.no_grad()
def test_sampling_beams_and_streaming(model):
    prompt = PROMPTS[1][None]
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, max_new_tokens=8, do_sample=True, top_k=20).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    beams = [model.generate(prompt, max_new_tokens=6, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)

    class Recorder(TextStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append("end")

    streamer = Recorder()
    out = model.generate(prompt, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.ids == [*out[0].tolist(), "end"]


@torch.no_grad()
def test_the_cache_of_recurrent_layers_does_not_grow():
    model = build(layers=LAYERS[2:])
    out = model(some_tokens(1, 10))
    few = out.past_key_values.nbytes
    out = model(some_tokens(1, 70), past_key_values=out.past_key_values)
    assert out.past_key_values.nbytes == few == model.model.state_bytes(80)
    assert out.past_key_values.get_seq_length() == 80


def test_the_loss_is_that_of_the_next_tokens(model):
    tokens, mask = padded()
    labels = tokens.masked_fill(mask == 0, -100)
    came = model(tokens, attention_mask=mask, labels=labels).loss
    logits = torch.cat([model(prompt[None]).logits[0, :-1] for prompt in PROMPTS])
    expected = torch.nn.functional.cross_entropy(logits, torch.cat([prompt[1:] for prompt in PROMPTS]))
    assert float(came) == pytest.approx(float(expected), rel=1e-5)
    came.backward()


def changed(folder, place, change):
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    values = json.loads((place / "config.json").read_text())
    change(values)
    (place / "config.json").write_text(json.dumps(values))
    return place


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["mixers"]["linearized_attention"].update(memory="gla"),
        lambda values: values["mixers"]["sliding_attention"].update(window=7),
        lambda values: values["model"].update(depth=4),
    ],
)
def test_an_edited_config_is_refused(folder, tmp_path, change):
    with pytest.raises(CheckpointError, match="were changed after export"):
        AutoModelForCausalLM.from_pretrained(changed(folder, tmp_path / "copy", change))


def test_missing_weights_are_refused(folder, tmp_path):
    copy = changed(folder, tmp_path / "copy", lambda values: None)
    weights = load_file(copy / "model.safetensors")
    del weights["model.blocks.3.mixer.rate_log"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SeqtrainError, match=r"missing keys: model\.blocks\.3\.mixer\.rate_log"):
        AutoModelForCausalLM.from_pretrained(copy)
