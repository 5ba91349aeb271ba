"""What a stage holds on a rank: counted without values for models too large for this machine."""

import dataclasses
from functools import cache

import pytest
from transformers import LlamaConfig

from seqtrain.config import compose_config
from seqtrain.convert.architecture import student_of
from seqtrain.convert.memory import held_bytes, made_bytes
from seqtrain.convert.settings import read_convert_config
from seqtrain.convert.stages import ConversionManifest, Training
from seqtrain.convert.tasks import Distillation, Pair, Transfer
from seqtrain.models.families import family_of

GB = 1e9
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
RANKS, WEIGHTS = {"7B": 8, "70B": 64}, {"7B": 6.74e9, "70B": 68.98e9}


@cache
def staged(size, stage, depth, **changes):
    """A stage of RADLADS, on rows of 4,096 tokens and a teacher in bfloat16, divided by ZeRO 3; and its config."""
    family = family_of("llama", "source")
    config = LlamaConfig(vocab_size=32000, **(SIZES[size] | {"num_hidden_layers": depth}))
    teacher = family.architecture(config, None)
    words = ["source=unused", "output_dir=unused", "recipe=radlads", "target=gated_delta_net", "runtime=ray"]
    words += [f"parallel.data={RANKS[size]}", "parallel.zero_stage=3"]
    typed = read_convert_config(compose_config("convert", words))
    pair = Pair(teacher, student_of(teacher, typed, ()), ())
    training = Training(typed, pair, ConversionManifest({}), None, lambda stage, what: None)
    chosen = {"teacher": "bfloat16", "dtype": "bfloat16", "sequence_length": 4096, "batch_size": RANKS[size]}
    told = dataclasses.replace(typed.recipe.stages[stage], **(chosen | changes))
    task = Distillation(pair, told) if told.kind == "train" else Transfer(pair, told, pair.converted)
    return task, training._settings(told, stage)


@pytest.mark.all
def test_what_is_kept_of_a_layer():
    """Fitted alone, its input and what is wanted of it, in bfloat16; in the whole model, recomputed, its input."""
    row = 4096 * 4096
    two, four = (made_bytes(*staged("7B", "align", depth)) for depth in (2, 4))
    assert (four - two) / 2 == pytest.approx(2 * 2 * row, rel=0.05)
    two, four = (made_bytes(*staged("7B", "distill", depth, activation_checkpointing=True)) for depth in (2, 4))
    assert (four - two) / 2 == pytest.approx(4 * row, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["align", "distill"])
@pytest.mark.parametrize("size", list(SIZES))
def test_large_models_fit_gpus(size, stage):
    """On 80 GB, where the float32 teacher alone was 28 GB of 7B on every rank, and in no GPU of 70B."""
    depth, changes = SIZES[size]["num_hidden_layers"], {"activation_checkpointing": stage == "distill"}
    found = held_bytes(*staged(size, stage, depth, **changes))
    # Every layer adds as much.
    two, four = (made_bytes(*staged(size, stage, few, **changes)) for few in (2, 4))
    found["activations"] = four + (four - two) / 2 * (depth - 4)
    print(size, stage, {name: round(value / GB, 1) for name, value in found.items()})
    assert sum(found.values()) < 80 * GB
    assert found["teacher"] == pytest.approx(2 * WEIGHTS[size] / RANKS[size], rel=0.01)
