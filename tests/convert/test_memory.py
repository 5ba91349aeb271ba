"""What a stage holds on a rank: counted without values for models too large for this machine."""

import dataclasses
from functools import cache

import pytest
from transformers import LlamaConfig

from seqtrain.config import compose_config
from seqtrain.convert.architecture import student_of
from seqtrain.convert.memory import stage_bytes
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
RANKS = {"7B": 8, "70B": 64}


@cache
def counted(size, stage, stage_number, depth):
    """Bytes of a rank in a stage of RADLADS, on rows of 4,096 tokens, teacher in bfloat16."""
    family = family_of("llama", "source")
    config = LlamaConfig(vocab_size=32000, **(SIZES[size] | {"num_hidden_layers": depth}))
    teacher = family.architecture(config, None)
    words = ["source=unused", "output_dir=unused", "recipe=radlads", "target=gated_delta_net", "runtime=ray"]
    words += [f"parallel.data={RANKS[size]}", f"parallel.zero_stage={stage_number}"]
    typed = read_convert_config(compose_config("convert", words))
    pair = Pair(teacher, student_of(teacher, typed, ()), ())
    training = Training(typed, pair, ConversionManifest({}), None, lambda stage, what: None)
    told = dataclasses.replace(
        typed.recipe.stages[stage],
        teacher="bfloat16",
        dtype="bfloat16",
        sequence_length=4096,
        batch_size=RANKS[size],
        activation_checkpointing=True,
    )
    task = Distillation(pair, told) if told.kind == "train" else Transfer(pair, told, pair.converted)
    return stage_bytes(task, training._settings(told, stage))


@pytest.mark.all
def test_layers_of_a_transfer_keep_their_inputs_alone():
    """Divided, a layer more keeps its input and what is wanted of it, in bfloat16; else nothing but its gradient."""
    row = 4096 * 4096 * 2
    two, four = (counted("7B", "align", 3, depth)["activations"] for depth in (2, 4))
    assert (four - two) / 2 == pytest.approx(2 * row, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["align", "distill"])
@pytest.mark.parametrize("size", list(SIZES))
def test_large_models_fit_gpus(size, stage):
    """On 80 GB, where the teacher alone was 28 GB of 7B on every rank."""
    depth = SIZES[size]["num_hidden_layers"]
    divided, whole = (counted(size, stage, number, depth) for number in (3, 1))
    print(size, stage, {name: round(value / GB, 1) for name, value in divided.items()})
    assert sum(divided.values()) < 80 * GB
    assert divided["teacher"] == pytest.approx(whole["teacher"] / RANKS[size])
    assert whole["teacher"] > 13 * GB
