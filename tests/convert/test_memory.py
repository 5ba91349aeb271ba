"""Loading, converting and saving hold the student, and one shard of its source at most."""

import ctypes
import gc

import pytest
import torch

from seqtrain.config import compose_config
from seqtrain.convert.architecture import architecture_of, student_of
from seqtrain.convert.export import export
from seqtrain.convert.settings import read_convert_config
from seqtrain.convert.sources import open_source
from seqtrain.convert.weights import load_student
from seqtrain.memory import AnonymousPeak
from tests.convert.convert_cases import COMMON


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
        student = load_student(architecture, source, dtype=torch.bfloat16, seed=0)
        export(student, architecture, source, tmp_path / "model")
    held = sum(parameter.nbytes for parameter in student.parameters())
    assert held > 25 * 2**20
    assert shard < 0.6 * held
    assert 0.9 * held < peak.bytes < held + shard
