"""A run that trains adapters of a pretrained model: on any layout, after a stop, and as PEFT loads them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqtrain.config import compose_config
from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.models import from_pretrained
from seqtrain.models.lora import LoraConfig
from seqtrain.runtime.export import main as export
from seqtrain.runtime.loading import open_run
from seqtrain.runtime.resolving import read_pretrain_config
from seqtrain.runtime.resume import begin
from seqtrain.runtime.source import with_network_of_source
from tests.command_cases import refused
from tests.models.family_cases import make
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    folder_of,
    losses,
    outcome,
    records,
    saved_weights,
    small_config,
    train_on,
)

VOCAB = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Matrices that are rows of ours, rows of ours in another order, and rows of two of ours."""
    folder = tmp_path_factory.mktemp("source") / "model"
    make("qwen3_next", vocab_size=VOCAB).save_pretrained(folder)
    return folder


def adapting(tmp_path, source, **sections):
    base = replace(small_config(tmp_path), mixer={}, source=str(source), lora=LoraConfig(rank=3, alpha=12))
    base = replace(base, model=type(base.model)())
    return with_network_of_source(change(base, train={"steps": 4}, optimizer={"lr": 1e-2}, **sections))


def their_logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.all
def test_two_ranks_train_what_peft_loads(tmp_path, source):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = adapting(tmp_path, source, parallel={"sequence": 2}, checkpoint={"every": 2})
    train_on(config)
    told = outcome(config)
    assert 0 < told["trained_parameters"] < told["parameters"]
    held = saved_weights(config)
    assert sum(value.numel() for value in held.values()) == told["trained_parameters"]
    again = as_it_was_at(config, 2, "again")
    train_on(again)
    assert [r["loss"] for r in records(again)] == losses(config)
    begin(folder_of(config), config)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert export([f"run={config.output_dir}", f"output_dir={adapter}"]) == 0
    assert export([f"run={config.output_dir}", f"output_dir={merged}", "merge=true"]) == 0
    _, ours, _ = open_run(folder_of(config).path)
    tokens = torch.randint(VOCAB, (1, 40))
    with torch.no_grad():
        expected = ours(tokens, all_logits=True)[0]
        before = from_pretrained(source)(tokens, all_logits=True)[0]
    assert (expected - before).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), adapter)
    torch.testing.assert_close(their_logits(theirs, tokens), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(their_logits(plain, tokens), expected, rtol=1e-5, atol=1e-5)
    for words, message in (
        (["as=seqtrain"], "trained adapters; merge=true"),
        (["as=llama", "merge=true"], "as=llama"),
    ):
        with refused(message, ConfigError):
            export([f"run={config.output_dir}", f"output_dir={tmp_path / 'other'}", *words])


@pytest.mark.full
def test_every_layout_and_segments_give_the_same(tmp_path, source):
    base = adapting(tmp_path, source, checkpoint={"every": 0})
    cases = {
        "zero0": {"parallel": {"data": 2, "zero_stage": 0}},
        "zero2": {"parallel": {"data": 2, "zero_stage": 2}},
        "zero3": {"parallel": {"data": 2, "zero_stage": 3}},
        "sequence": {"parallel": {"sequence": 2}},
        "segments": {"train": {"segment_tokens": 8}},
        "recomputed": {"model": {"activation_checkpointing": True}},
    }
    configs = {name: change(base, name, **sections) for name, sections in cases.items()}
    train_on(base, *configs.values())
    for name, config in configs.items():
        assert losses(config) == pytest.approx(losses(base), rel=1e-5), name


@pytest.mark.full
@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (2, "muon"), (3, "adamw")])
def test_it_resumes_bit_for_bit(tmp_path, source, stage, optimizer):
    config = adapting(tmp_path, source, parallel={"data": 2, "zero_stage": stage}, checkpoint={"every": 2})
    config = change(config, optimizer={"name": optimizer})
    train_on(config)
    again = as_it_was_at(config, 2, "again")
    train_on(again)
    assert [r["loss"] for r in records(again)] == losses(config)


@pytest.mark.all
def test_other_weights_under_its_adapters_are_refused(tmp_path, source):
    config = change(adapting(tmp_path, source), train={"steps": 2})
    train_on(config)
    begin(folder_of(config), config)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, other / "model.safetensors")
    moved = replace(config, source=str(other))
    with refused("lora.source_sha256=", CheckpointError):
        train_on(replace(moved, train=replace(moved.train, steps=4)))
    begin(folder_of(config), moved)
    with refused("the weights' sha256 is", CheckpointError):
        open_run(folder_of(config).path)


@pytest.mark.all
def test_what_adapters_can_not_be_is_one_line(tmp_path, source):
    words = [f"source={source}", "data=stdlib", f"output_dir={tmp_path / 'out'}", "runtime=inline", "lora.rank=4"]
    config = read_pretrain_config(compose_config("pretrain", [*words, "lora.targets=[q_proj,in_proj_ba]"]))
    assert config.lora == LoraConfig(rank=4, targets=("q_proj", "in_proj_ba"))
    with refused(
        f"lora.targets=gate: is no matrix of source={source} that can have an adapter; these are: in_proj_qkvz"
    ):
        read_pretrain_config(compose_config("pretrain", [*words, "lora.targets=[q_proj,gate]"]))
    with refused("lora.rank=4: adapters are for a pretrained model; name one: source="):
        read_pretrain_config(compose_config("pretrain", words[1:]))
