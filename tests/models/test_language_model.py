"""The network: loss and gradients against plain PyTorch, recomputation, counts, initial weights, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from seqtrain.config import compose_config, conf_dir
from seqtrain.initialization import materialize
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.testing import relative_error
from seqtrain.validation import validate
from tests.command_cases import refused
from tests.models import tiny
from tests.models.tiny import VOCAB, batch

# Tiny ones are trained in test_block.
PRESETS = sorted(
    path.stem for path in (conf_dir() / "model").glob("*.yaml") if not path.stem.endswith(("_tiny", "pretrained"))
)
HYBRID = ("gated_delta_net", "gla", "hgrn2", "s5", "tensor_attention", "sliding_attention")


def build(*, layers=HYBRID, depth=6, **fields):
    fields = {"width": 32, "loss_chunk": 16, "seed": 1, **fields}
    return tiny.build(layers, depth=depth, settings={}, **fields)


def loss_and_gradients(model, *arguments, **options):
    loss = model(*arguments, **options)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_loss_and_gradients_equal_cross_entropy_of_all_logits(tie_embeddings):
    model = build(tie_embeddings=tie_embeddings, dtype=torch.float64)
    tokens, labels = batch()
    labels[0, :7] = -100
    loss, gradients = loss_and_gradients(model, tokens, labels)
    logits, _ = model(tokens, all_logits=True)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    assert relative_error(loss, expected) < 1e-12
    truth = torch.autograd.grad(expected, list(model.parameters()))
    for (name, came), right in zip(gradients.items(), truth, strict=True):
        assert relative_error(came, right) < 1e-10, name


def test_recomputing_keeps_fewer_activations():
    def saved_numbers(recompute):
        model, count = build(activation_checkpointing=recompute), 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(*batch(tokens=256))
        return count

    assert saved_numbers(True) < saved_numbers(False) / 5


@torch.no_grad()
def test_state_continues_a_sequence():
    model = build(layers=tuple(MIXERS.names), depth=len(MIXERS.names), dtype=torch.float64)
    tokens, _ = batch()
    whole, final = model(tokens)
    _, state = model(tokens[:, :13])
    rest, after = model(tokens[:, 13:], state=state)
    assert relative_error(rest, whole) < 1e-10
    assert [each.keys() for each in after] == [each.keys() for each in final]


def test_every_mixer_draws_its_weights_from_the_generator_given():
    model, draws = build(layers=tuple(MIXERS.names), depth=len(MIXERS.names)), []
    fill = model.initial_weights(4)
    for seed in (1, 9):
        torch.manual_seed(seed)
        draws.append({name: value.clone() for name, value in materialize(model, fill, torch.device("cpu"))})
    assert [name for name, value in draws[0].items() if not torch.equal(value, draws[1][name])] == []


def test_initial_weights_have_the_sizes_asked_for():
    model = build(layers=("gated_delta_net", "gla"), depth=8, width=128, heads=4, tie_embeddings=False)
    weights = dict(model.named_parameters())
    for name in ("embedding.weight", "head.weight", "blocks.1.mlp.up.weight", "blocks.0.mixer.qkv.linear.weight"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.05), name
    for name in ("blocks.0.mixer.out.weight", "blocks.3.mlp.out.weight"):
        assert weights[name].std().item() == pytest.approx(0.02 / 4, rel=0.05), name
    assert not weights["blocks.1.mixer.forget.1.bias"].any()
    # A fresh model knows nothing: its loss is that of a uniform guess.
    tokens, labels = batch()
    assert model(tokens, labels).item() / labels.numel() == pytest.approx(math.log(VOCAB), rel=0.02)


def test_weight_decay_by_dimension_leaves_gates_norms_and_decays_alone():
    model = build(layers=tuple(MIXERS.names), depth=len(MIXERS.names))
    decays = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert not {name for name in decays if "norm" in name or not name.endswith(".weight")}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_counts(tie_embeddings):
    model = build(tie_embeddings=tie_embeddings)
    assert (model.head.weight is model.embedding.weight) == tie_embeddings
    assert model.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    tokens, _ = batch(rows=1)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    matrices = sum(module.weight.numel() for module in (*linear, model.head))
    operators = [
        6 * 40 * 2 * 12 * 24 + 2 * 40 * 4 * 96,  # the delta rule, 6 T H K V, and a convolution, 2 T W channels
        4 * 40 * 2 * 8 * 16,  # linear attention: 4 T H K V
        4 * 40 * 2 * 16 * 16,
        8 * 40 * 16,  # a complex scan of P states: 8 T P
        7 * 40 * 2 * 15 * 17 + 2 * 40 * 4 * 88,  # tensor attention of F features: 7 T H F (V+1); a convolution
        40 * 41 // 2 * 2 * 2 * (16 + 16),  # softmax attention: 2 H (K+V) for each pair
    ]
    assert model.flops(40) == 2 * 40 * matrices + sum(operators)
    with torch.no_grad():
        _, state = model(tokens)
    assert model.state_bytes(40) == sum(value.nbytes for layer in state for value in layer.values())


def test_mixers_that_are_left_out_have_their_defaults():
    config = ModelConfig(layers=("gla",), depth=2, width=64, heads=2)
    models = []
    for mixers in ({}, {"gla": MIXERS.get("gla").Config()}):
        torch.manual_seed(0)
        models.append(LanguageModel(config, mixers, 256).state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize("name", PRESETS)
def test_every_large_preset_builds_on_meta(name):
    config = validate(ModelConfig, OmegaConf.to_container(compose_config(f"model/{name}").model))
    with torch.device("meta"):
        model = LanguageModel(config, {}, 50257)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.parameter_count() == sum(parameter.numel() for parameter in model.parameters())
    sizes = {"125m": 125e6, "350m": 350e6, "1b": 1e9, "7b": 7e9, "76b": 76e9}
    assert 0.8 < model.parameter_count() / sizes.get(name.split("_")[-1], model.parameter_count()) < 1.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": -2}, "model.depth=-2: must be greater than 0"),
        ({"width": 100, "heads": 8}, "model.width=100: must be divisible by model.heads=8"),
        ({"layers": ("retnett",)}, "mixer 'retnett' is unknown; did you mean 'retnet'? Known: "),
        ({"layers": ("attention",), "width": 30}, "mixer.attention.rope_base=10000.0: a head has 15 channels"),
    ],
)
def test_a_shape_that_does_not_fit_is_one_line(fields, message):
    with refused(message):
        build(**fields)
