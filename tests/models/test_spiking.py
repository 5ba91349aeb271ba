"""Spikes: counts and trains, where a model has them, what is counted, and the two published models by their numbers."""

import pytest
import torch
from torch import nn

from seqtrain.config import compose_config
from seqtrain.models import LanguageModel
from seqtrain.models.feed_forward import MoE
from seqtrain.models.spiking import (
    Spikes,
    counting_spikes,
    counts_of,
    round_weights,
    spike_counts,
    spike_inputs,
    spike_statistics,
    spike_train,
    step_weights,
)
from seqtrain.runtime import read_pretrain_config
from seqtrain.testing import relative_error
from tests.models import tiny

WIDTH = 32


def model(**fields):
    fields = {"depth": 2, "width": WIDTH, "initializer_range": 0.3, "layers": ("gla", "attention"), **fields}
    return tiny.build(**fields)


def tokens(count=30, rows=2):
    return tiny.batch(count, rows)[0]


def test_counts_follow_the_activations():
    values = torch.tensor([[1.0, -2.0, 0.2, 4.8], [10.0, -20.0, 2.0, 48.0], [0.0, 0.0, 0.0, 0.0]])
    counts, threshold = spike_counts(values, 1.0)
    assert threshold.flatten().tolist() == [2.0, 20.0, 0.0]
    # Halves go to the even integer: 0.5 is silent.
    assert counts.tolist() == [[0, -1, 0, 2], [0, -1, 0, 2], [0, 0, 0, 0]]
    assert spike_counts(values, 4.0)[0][0].tolist() == [2, -4, 0, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_are_whole_and_gradients_pass(dtype):
    torch.manual_seed(0)
    values = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    out = Spikes(2.0)(values)
    counts, threshold = spike_counts(values.detach(), 2.0)
    assert torch.equal(out, (counts * threshold).to(dtype))
    (gradient,) = torch.autograd.grad((out * 3).sum(), values)
    assert torch.equal(gradient, torch.full_like(values, 3.0))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ternary", [[1, -1, 0], [1, -1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]),
        ("bitwise", [[1, 0, 0], [0, -1, 0], [1, 0, 0]]),
        ("complement", [[0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]]),
    ],
)
def test_trains_of_spikes(code, expected):
    counts = torch.tensor([5.0, -2.0, 0.0])
    assert spike_train(counts, code).tolist() == expected
    assert counts_of(spike_train(counts, code), code).tolist() == [5, -2, 0]
    assert spike_train(counts.abs(), "binary").sum(0).tolist() == [5, 2, 0]


@pytest.mark.parametrize("code", ["binary", "ternary", "bitwise", "complement"])
def test_trains_are_as_long_as_needed_and_exact(code):
    counts = torch.arange(0 if code == "binary" else -130, 131).view(1, -1)
    train = spike_train(counts, code)
    assert train.dtype == torch.int8
    assert set(train.unique().tolist()) <= {-1, 0, 1}
    assert len(train) == {"binary": 130, "ternary": 130, "bitwise": 8, "complement": 9}[code]
    assert torch.equal(counts_of(train, code), counts)
    # With steps to spare.
    assert torch.equal(counts_of(spike_train(counts, code, len(train) + 3), code), counts)
    with pytest.raises(ValueError, match=f"steps={len(train) - 1}, but counts from .* need {len(train)}"):
        spike_train(counts, code, len(train) - 1)
    # What hardware does: additions of weights, a step after the other.
    weights = torch.randn(4, counts.shape[1], dtype=torch.float64)
    steps = step_weights(len(train), code).double()[:, None, None] * (train.double() @ weights.T)
    torch.testing.assert_close(steps.sum(0), counts.double() @ weights.T)


def test_what_no_train_holds_is_refused():
    with pytest.raises(ValueError, match="code=binary has no inhibitory spikes for a count of -1"):
        spike_train(torch.tensor([1.0, -1.0]), "binary")
    with pytest.raises(ValueError, match="counts has fractions"):
        spike_train(torch.tensor([0.5]), "ternary")
    with pytest.raises(ValueError, match="code=morse, expected one of binary, ternary, bitwise, complement"):
        spike_train(torch.tensor([1.0]), "morse")


@torch.no_grad()
def test_every_projection_of_a_model_is_given_spikes():
    spiking = model(spike_rate=2.0)
    linears = {name: module for name, module in spiking.named_modules() if isinstance(module, nn.Linear)}
    came, made = {}, {}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, x, name=name: came.__setitem__(name, x[0]), prepend=True)
        linear.register_forward_hook(lambda _, x, out, name=name: made.__setitem__(name, out))
    spiking(tokens())
    assert came.keys() == made.keys() == linears.keys()
    assert len(linears) == 5 + 2 + 2 * 2
    for name, linear in linears.items():
        counts, threshold = spike_counts(came[name], 2.0)
        product = nn.functional.linear(counts * threshold, linear.weight, linear.bias)
        torch.testing.assert_close(made[name], product, atol=1e-5, rtol=1e-5)
    assert spiking.state_dict().keys() == model().state_dict().keys()
    assert not torch.allclose(spiking(tokens())[0], model()(tokens())[0])
    # As many spikes as there are bits in a float, and it is the model again.
    spike_inputs(spiking.blocks, 1e6)
    torch.testing.assert_close(spiking(tokens())[0], model()(tokens())[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_experts_are_given_spikes():
    torch.manual_seed(0)
    fields = {"mlps": ("moe",), "experts": 3, "experts_per_token": 2, "shared_expert_width": 16}
    plain, spiking = (model(**fields, spike_rate=rate) for rate in (0.0, 3.0))
    [moe] = [module for module in spiking.blocks[:1].modules() if isinstance(module, MoE)]
    x = torch.randn(7, WIDTH)
    counts, threshold = spike_counts(x, 3.0)
    weights, chosen, _ = moe.route(x)
    made = torch.zeros(7, WIDTH)
    for token in range(7):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, value = (moe.up[expert] @ (counts[token] * threshold[token])).chunk(2)
            inner, size = spike_counts(nn.functional.silu(gate) * value, 3.0)
            made[token] += weight * (moe.down[expert] @ (inner * size))
    torch.testing.assert_close(moe(x) - moe.shared(x), made, atol=1e-5, rtol=1e-4)
    assert spiking.state_dict().keys() == plain.state_dict().keys()


def test_statistics_are_of_what_was_counted():
    counts = torch.tensor([[0.0, 1.0, -3.0, 7.0], [8.0, 0.0, -15.0, 2.0], [0.0, 0.0, 0.0, -511.0]])
    gauge = nn.Sequential(Spikes(counts.abs().mean(-1, keepdim=True)))
    assert spike_statistics(gauge) is None
    with torch.no_grad(), counting_spikes(gauge):
        gauge(counts)
    gauge(counts)
    found = spike_statistics(gauge)
    assert found.values == 12
    assert found.silent == 5 / 12
    assert found.spikes == (1 + 2 + 3 + 1 + 4 + 1 + 9) / 12
    # 8, 15 and 511 don't fit; of the other nine windows of three places, seven places are taken.
    assert found.within == 9 / 12
    assert found.sparsity == pytest.approx(1 - 7 / 27)
    assert spike_statistics(model()) is None
    with counting_spikes(gauge):
        pass
    assert spike_statistics(gauge) is None


def test_statistics_of_normal_numbers():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))[None]
    gauge = Spikes(1.0)
    with counting_spikes(gauge):
        gauge(normal)
    # |x| below half of its mean, sqrt(2 / pi): erf(1 / sqrt(4 pi)) of a normal.
    assert spike_statistics(gauge).silent == pytest.approx(torch.erf(torch.tensor(0.28209)).item(), abs=3e-3)


def test_weights_are_rounded_group_by_group():
    weight = torch.tensor([[127.0, 0.4, -1.6, 0.0, 1.27, -0.634, 0.0]])
    rounded = round_weights(weight, bits=8, group=4)
    torch.testing.assert_close(rounded, torch.tensor([[127.0, 0.0, -2.0, 0.0, 1.27, -0.63, 0.0]]))
    wide = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    assert 0.001 < relative_error(round_weights(wide), wide) < 0.01
    assert torch.equal(round_weights(torch.zeros(2, 3)), torch.zeros(2, 3))


def preset(name):
    config = read_pretrain_config(compose_config("pretrain", [f"model={name}", "data.path=x"]))
    with torch.device("meta"):
        return config, LanguageModel(config.model, config.mixer, vocab_size=257)


def test_the_7b_has_the_released_model_s_sizes():
    """hf_7B_model/configuration_gla_swa.py of BICLab/SpikingBrain-7B at ef99987."""
    config, network = preset("spikingbrain_7b")
    width, keys, hidden, vocab = 3584, 4 * 128, 18944, 152064
    softmax = width * (width + 2 * keys) + width + 2 * keys + width * width
    gate = width * 16 + 16 * keys + keys + 128
    assert network.parameter_count() == 28 * (softmax + 3 * width * hidden + 2 * width) + 14 * gate + (
        2 * vocab * width + width
    )
    names = [config.model.mixer(index) for index in range(28)]
    assert [index for index, name in enumerate(names) if name == "sliding_attention"] == list(range(1, 28, 2))
    assert config.mixer["sliding_attention"].window == 4096
    assert config.model.spike_rate == 3.0


def test_the_76b_has_the_report_s_numbers():
    """arXiv 2509.05276, figure 3 and section 2.3."""
    _, network = preset("spikingbrain_76b")
    total = network.parameter_count()
    idle = sum(15 * (block.mlp.up[0].numel() + block.mlp.down[0].numel()) for block in network.blocks if experts(block))
    assert round(total / 1e9) == 76
    assert round((total - idle) / 1e9) == 12
    dense = [index for index, block in enumerate(network.blocks, 1) if not experts(block)]
    assert dense == [1, 2, 3, 5, 7, 9, 11]
    full = [index for index, block in enumerate(network.blocks, 1) if not block.mixer.constant_state]
    assert full == [7, 14, 21, 28]
    assert {block.mixer.sinks.count for block in network.blocks if block.mixer.sinks is not None} == {128}


def experts(block):
    return isinstance(block.mlp, MoE)
