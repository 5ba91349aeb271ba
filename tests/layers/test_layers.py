"""The shared parts: initial step sizes and rates, rotation, feature maps, norms, errors of settings, lazy imports."""

import pytest
import torch

from seqtrain.layers import FEATURE_MAPS, RMSNorm, ShortConvolution, l2norm, rotate, step_sizes
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.testing import relative_error
from tests.command_cases import refused


def build(name, width=256, heads=64, **fields):
    torch.manual_seed(0)
    cls = MIXERS.get(name)
    return cls(cls.Config(**fields), LayerShape(width, heads))


@pytest.mark.parametrize("name", ["mamba2", "gated_delta_net", "kda"])
def test_step_sizes_start_log_uniform_and_rates_uniform(name):
    mixer = build(name)
    steps = step_sizes(torch.zeros(()), mixer.step_bias).log10()
    assert -3.001 < steps.min() < -2.8
    assert -1.2 < steps.max() < -0.999
    assert steps.mean().item() == pytest.approx(-2, abs=0.25)
    rates = mixer.rate_log.exp()
    assert 0 < rates.min() < 2.5
    assert 14 < rates.max() < 16.001


def test_scores_of_rotated_vectors_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    places = torch.tensor([[0, 3, 1_000_003]])
    score = (rotate(q.expand(1, 3, 1, 16), places + 5, 1e4) * rotate(k.expand(1, 3, 1, 16), places, 1e4)).sum(-1)
    assert relative_error(score, score[:, :1].expand_as(score)) < 1e-9
    assert not torch.allclose(score[0, 0], (q * k).sum())
    assert torch.equal(rotate(q, torch.zeros(1, 1, dtype=torch.int64), 1e4), q)


def test_far_positions_keep_their_precision_in_float32():
    x = torch.ones(1, 1, 1, 16)
    place = torch.tensor([[1_000_003]])
    assert relative_error(rotate(x, place, 1e4), rotate(x.double(), place, 1e4)) < 1e-6


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps_say_their_sign(name):
    phi, non_negative = FEATURE_MAPS[name]
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    assert (phi(x) @ phi(x).T >= 0).all().item() == non_negative


def test_norms_keep_the_dtype_and_survive_zeros():
    x = torch.zeros(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    for normalized in (RMSNorm(8)(x), l2norm(x)):
        assert normalized.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(normalized.sum(), x)
        assert gradient.isfinite().all()
    wide = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(l2norm(wide), l2norm(wide.float()).bfloat16())
    assert torch.equal(RMSNorm(33)(wide), RMSNorm(33)(wide.float()).bfloat16())
    parts = RMSNorm(8, groups=2)(torch.tensor([3.0] * 4 + [100.0] * 4))
    assert relative_error(parts, torch.ones(8)) < 1e-6


def test_a_short_convolution_starts_within_its_bound():
    weight = ShortConvolution(500, 4).weight
    assert 0.49 < weight.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mamba2", {"groups": 3}, "mixer.mamba2.groups=3: must divide model.heads=4"),
        ("attention", {"query_group": 3}, "mixer.attention.query_group=3: must divide model.heads=4"),
        ("gla", {"expand_key": 0.3}, "mixer.gla.expand_key=0.3: times model.width=32 must be divisible by"),
        ("s5", {"step_low": 0.5}, "mixer.s5.step_low=0.5: must be at most step_high=0.1"),
        ("s4d", {"step_low": 1.0}, "mixer.s4d.step_low=1.0: must be at most step_high=0.1"),
        ("s5", {"blocks": 3}, "mixer.s5.expand_state=1.0: times model.width=32 must be divisible by 2 * blocks=6"),
        ("tcnca", {"expand_key": 0.125}, "mixer.tcnca.expand_key=0.125: times model.width=32 over model.heads=4"),
        ("tcnca", {"expand_value": 0.3}, "mixer.tcnca.expand_value=0.3: times model.width=32 must be divisible"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(name, fields, message):
    with refused(message):
        build(name, width=32, heads=4, **fields)
