"""A run that continues a pretrained model: from its weights, on any layout, after a stop, and back to its type."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from seqtrain.config import compose_config
from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig, from_pretrained
from seqtrain.runtime.export import main as export
from seqtrain.runtime.loading import open_run
from seqtrain.runtime.resolving import read_pretrain_config
from seqtrain.runtime.resume import begin
from seqtrain.runtime.source import with_network_of_source
from tests.command_cases import refused
from tests.models.family_cases import make
from tests.runtime.runtime_cases import as_it_was_at, change, folder_of, losses, records, small_config, train_on

VOCAB = 300


FAMILIES = [pytest.param(name, marks=pytest.mark.all) for name in ("qwen3_next", "seqtrain")]
FAMILIES.append(pytest.param("zamba2", marks=pytest.mark.full))


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    folder, name = tmp_path_factory.mktemp("source") / "model", getattr(request, "param", "qwen3_next")
    model = converted() if name == "seqtrain" else make(name, vocab_size=VOCAB)
    model.save_pretrained(folder)
    return folder


def converted():
    """A model of seqtrain's own type, as a conversion leaves it."""
    from seqtrain.models.export import as_huggingface

    mixers = {"linearized_attention": MIXERS.get("linearized_attention").Config(memory="gla", window=8, sinks=2)}
    config = ModelConfig(layers=("linearized_attention", "attention"), depth=2, width=32, heads=4)
    return as_huggingface(LanguageModel(config, mixers, VOCAB, seed=3).eval(), mixers)


def continuing(tmp_path, source, **sections):
    base = replace(small_config(tmp_path), mixer={}, source=str(source))
    base = replace(base, model=type(base.model)())
    return with_network_of_source(change(base, train={"steps": 4}, optimizer={"lr": 1e-3}, **sections))


@pytest.mark.all
def test_it_begins_where_the_source_is(tmp_path, source):
    config = continuing(tmp_path, source)
    train_on(config)
    assert from_pretrained(source).config.experts == config.model.experts == 5
    # Before any step the loss is that of the source's weights, which differs from a new model's.
    new = change(config, "new", source="")
    train_on(new)
    assert abs(losses(config)[0] - losses(new)[0]) > 1e-3


LAYOUTS = {
    "zero1": {"parallel": {"data": 2, "zero_stage": 1}},
    "zero2": {"parallel": {"data": 2, "zero_stage": 2}},
    "zero3": {"parallel": {"data": 2, "zero_stage": 3}},
    "sequence": {"parallel": {"sequence": 2}},
    "segments": {"train": {"segment_tokens": 8}},
}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        pytest.param("qwen3_next", ("zero3", "sequence", "segments"), marks=pytest.mark.all),
        pytest.param("qwen3_next", ("zero1", "zero2"), marks=pytest.mark.full),
        pytest.param("zamba2", tuple(LAYOUTS), marks=pytest.mark.full),
    ],
    indirect=["source"],
)
def test_every_layout_and_segments_give_the_same(tmp_path, source, names):
    base = continuing(tmp_path, source, checkpoint={"every": 0})
    configs = {name: change(base, name, **LAYOUTS[name]) for name in names}
    train_on(base, *configs.values())
    for name, config in configs.items():
        assert losses(config) == pytest.approx(losses(base), rel=1e-5), name


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_it_goes_on_and_becomes_what_it_was(tmp_path, source):
    config = continuing(tmp_path, source, checkpoint={"every": 2})
    train_on(config)
    again = as_it_was_at(config, 2, "again")
    train_on(again)
    assert [r["loss"] for r in records(again)] == losses(config)
    begin(folder_of(config), config)
    assert export([f"run={config.output_dir}", f"output_dir={tmp_path / 'exported'}"]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "exported" / "model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    _, ours, _ = open_run(folder_of(config).path)
    tokens = torch.randint(VOCAB, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, all_logits=True)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_source_brings_its_network(tmp_path, source):
    words = [f"source={source}", "data=stdlib", f"output_dir={tmp_path / 'out'}", "runtime=inline"]
    config = read_pretrain_config(compose_config("pretrain", words))
    assert config.model.vocab_size == VOCAB
    assert config.model.depth == 4
    assert config.optimizer.lr == 2e-5
    assert config.presets["model"] == "pretrained"
    # As plans print it.
    assert read_pretrain_config(compose_config("pretrain", [*words, "model=pretrained"])) == config
    for word in ("model=hybrid_tiny", "mixer.attention.rope_base=5.0"):
        with refused(f"{word.partition('=')[0]}: source= brings a network of its own", ConfigError):
            compose_config("pretrain", [*words, word])
    # How a router is trained is the run's to say, and not which it is.
    config = read_pretrain_config(compose_config("pretrain", [*words, "model.router.balance=0.5"]))
    assert (config.model.router.balance, config.model.router.shared_gate) == (0.5, True)
    with refused(f"model.router.scale=2.0: source={source} brings a network of its own", ConfigError):
        read_pretrain_config(compose_config("pretrain", [*words, "model.router.scale=2.0"]))
    with refused(f"model.depth=3: source={source} brings a network of its own", ConfigError):
        read_pretrain_config(compose_config("pretrain", [*words, "model.depth=3"]))


def test_a_source_that_is_none_is_one_line(tmp_path, source):
    with refused(f"source={tmp_path}: holds no config.json", ConfigError):
        read_pretrain_config(compose_config("pretrain", [f"source={tmp_path}", f"output_dir={tmp_path / 'out'}"]))
    values = json.loads((source / "config.json").read_text())
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps(values | {"model_type": "gpt_bigcode"}))
    with refused("architecture 'gpt_bigcode' is unknown", ConfigError):
        read_pretrain_config(compose_config("pretrain", [f"source={strange}", f"output_dir={tmp_path / 'out'}"]))
