"""S4D, S4-PTD, S5, S5-PTD against their continuous systems, discretized by other means and run token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.mixers.common.hippo import (
    hippo_legs,
    normal_legs,
    perturb_then_diagonalize,
    perturbed_legs,
    report_perturbation,
    sized_legs,
)
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error

pytestmark = pytest.mark.usefixtures("no_gradients")

WIDTH, TOKENS = 8, 30
CHANNELWISE = [("s4d", {"initialization": name}) for name in ("lin", "inv", "legs")] + [("s4_ptd", {})]
EVERY = [*CHANNELWISE, ("s5", {"blocks": 2}), ("s5_ptd", {"blocks": 2})]


def build(name, width=WIDTH, **fields):
    torch.manual_seed(4)
    cls = MIXERS.get(name)
    return cls(cls.Config(**fields), LayerShape(width, 2, 1, 4)).double()


def x(tokens=TOKENS, batch=2):
    generator = torch.Generator().manual_seed(6)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)


def held(rate, step, rule):
    """`(a, gain)` by the exponential of the augmented matrix, or by the trapezoidal rule written out."""
    if rule == "bilinear":
        return (1 + step * rate / 2) / (1 - step * rate / 2), step / (1 - step * rate / 2)
    augmented = torch.zeros(*rate.shape, 2, 2, dtype=torch.complex128)
    augmented[..., 0, 0], augmented[..., 0, 1] = rate * step, step
    discrete = torch.linalg.matrix_exp(augmented)
    return discrete[..., 0, 0], discrete[..., 0, 1]


def finished(mixer, y, u):
    y = F.gelu(y + mixer.skip * u)
    return mixer.out(y) * torch.sigmoid(mixer.gate(y))


def one_by_one(mixer, u, direction=0):
    """`2 Re(C h)` of every channel's own system, `h_t = a h_{t-1} + gain u_t`."""
    pairs = mixer.config.state // 2
    rate = torch.complex(-mixer.decay_log.exp(), mixer.frequency).view(WIDTH, pairs)
    a, gain = held(rate, mixer.step_log.exp()[:, None], mixer.config.discretization)
    parts = mixer.readout.view(-1, WIDTH, pairs, 2)[direction]
    hidden, out = torch.zeros(len(u), WIDTH, pairs, dtype=torch.complex128), []
    for token in u.unbind(1):
        hidden = a * hidden + gain * token[..., None]
        out.append(2 * (torch.complex(parts[..., 0], parts[..., 1]) * hidden).sum(2).real)
    return torch.stack(out, 1)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("form", ["scan", "fft"])
@pytest.mark.parametrize(("name", "fields"), CHANNELWISE)
def test_a_system_per_channel(name, fields, form, rule):
    mixer = build(name, state=8, form=form, discretization=rule, **fields)
    assert relative_error(mixer(x())[0], finished(mixer, one_by_one(mixer, x()), x())) < 1e-11


@pytest.mark.parametrize("form", ["scan", "fft"])
def test_fft_continues_from_a_state_as_the_scan_does(form):
    mixer, whole = build("s4d", form=form), build("s4d")(x(150))[0]
    first, state = mixer(x(150)[:, :70])
    assert relative_error(torch.cat([first, mixer(x(150)[:, 70:], state)[0]], 1), whole) < 1e-11


def test_documents_are_scanned_whatever_the_form():
    packed = SequenceContext(boundaries([7, 0, 90]))
    outs = [build("s4d", form=form)(x(97, batch=1), sequence=packed)[0] for form in ("scan", "fft")]
    assert torch.equal(*outs)


def test_initial_eigenvalues_are_the_papers():
    frequency = {name: build("s4d", initialization=name, state=64).frequency[:32] for name in ("lin", "inv", "legs")}
    n = torch.arange(32)
    assert relative_error(frequency["lin"], math.pi * n) < 1e-6
    assert frequency["inv"][0].item() == pytest.approx(64 / math.pi * 63)
    # S4D's figure 2: inv follows the eigenvalues of HiPPO's normal part, from the largest down.
    legs = frequency["legs"].sort(descending=True).values
    assert relative_error(frequency["inv"][:16], legs[:16]) < 0.1
    for name in ("lin", "inv", "legs"):
        mixer = build("s4d", initialization=name)
        assert relative_error(mixer.decay_log.exp(), torch.full_like(mixer.decay_log, 0.5)) < 1e-6
    steps = build("s4d", width=512).step_log.exp()
    assert 1e-3 <= steps.min() < 1.1e-3
    assert 0.09 < steps.max() <= 0.1


def test_parameters_of_s4d_are_those_of_its_authors_layer():
    """Their S4DKernel and D for H channels, N states: dt, D, and N/2 real parts, imaginary parts and complex C each."""
    mixer = build("s4d", width=128, state=64)
    kernel = 128 + 128 + 128 * 32 * (1 + 1 + 2)
    assert mixer.parameter_count() == 2 * 128 * 128 + kernel


def test_hippo_is_the_published_matrix():
    a, b = hippo_legs(4)
    for n in range(4):
        assert b[n] == math.sqrt(2 * n + 1)
        for k in range(4):
            expected = math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else n + 1 if n == k else 0
            assert a[n, k].item() == pytest.approx(-expected)


def begin(mixer):
    """Draws each parameter anew, in its own precision, from a generator of seed 3."""
    with torch.no_grad():
        for parameter, draw in mixer.initializers().items():
            draw(parameter, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["s4_ptd", "legs"])
def test_a_layer_starts_as_hippo_or_what_is_near_it(name):
    """The impulse responses are those of a dense real system with HiPPO's B, and a real C of normal numbers."""
    size, mixer = 8, build("s4_ptd", state=8) if name == "s4_ptd" else build("s4d", state=8, initialization="legs")
    begin(mixer)
    c = torch.randn(WIDTH, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, b = hippo_legs(size)
    p = (torch.arange(size, dtype=torch.float64) + 0.5).sqrt()
    a = a + (1 if name == "legs" else sized_legs(size, 0.1).share) * p[:, None] * p
    b = b / 2 if name == "legs" else b
    readout = torch.view_as_complex(mixer.readout.view(WIDTH, 4, 2))
    rate = torch.complex(-mixer.decay_log.exp(), mixer.frequency).view(WIDTH, 4)
    for time in (0.0, 0.1, 0.5, 2.0):
        came = 2 * (readout * (rate * time).exp()).real.sum(1)
        assert relative_error(came, c @ torch.linalg.matrix_exp(a * time) @ b) < 1e-10


@pytest.mark.parametrize("name", ["s5", "s5_ptd"])
def test_one_system_for_all_channels_starts_from_real_matrices(name):
    """Written in the eigenvectors, B and C are real: the complex half is the whole real system of HiPPO's block."""
    mixer = build(name, blocks=1, step_low=0.05, step_high=0.05)
    begin(mixer)
    drawn = torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    spectrum = normal_legs(8) if name == "s5" else sized_legs(8, 0.28)
    a = 2 * ((spectrum.vectors * spectrum.values) @ spectrum.inverse).real
    write = torch.view_as_complex(mixer.write.weight.unflatten(0, (-1, 2)).transpose(1, 2).contiguous())
    b = 2 * (spectrum.vectors @ write).real
    assert relative_error(b, drawn / math.sqrt(WIDTH)) < 1e-10
    read = mixer.read.weight.unflatten(1, (-1, 2))
    c = 2 * (torch.complex(read[..., 0], -read[..., 1]) / 2 @ spectrum.inverse).real
    augmented = torch.zeros(16, 16, dtype=torch.float64)
    augmented[:8, :8], augmented[:8, 8:] = a * 0.05, 0.05 * b
    discrete = torch.linalg.matrix_exp(augmented)
    hidden, out = torch.zeros(2, 8, dtype=torch.float64), []
    for token in x().unbind(1):
        hidden = hidden @ discrete[:8, :8].T + token @ discrete[:8, 8:].T
        out.append(hidden @ c.T)
    assert relative_error(mixer(x())[0], finished(mixer, torch.stack(out, 1), x())) < 1e-10


def test_s5_ptd_starts_damped_as_hippo_is_and_s5_does_not():
    """The mean of the eigenvalues is the trace over P: -(P + 1) / 2 for HiPPO, and E's own share of it."""
    decay = {name: build(name, blocks=1).decay_log.exp() for name in ("s5", "s5_ptd")}
    found = sized_legs(WIDTH, 0.28)
    assert decay["s5"].max().item() == pytest.approx(0.5)
    assert decay["s5_ptd"].mean().item() == pytest.approx((WIDTH + 1) / 2 - found.size / WIDTH)
    assert decay["s5_ptd"].min() > 0.5


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_both_directions_are_two_passes(name, fields):
    mixer = build(name, bidirectional=True, **fields)
    one_way = build(name, **fields)
    shared = {key: value for key, value in mixer.state_dict().items() if key not in ("read_back.weight", "readout")}
    outs = []
    for direction in (0, 1):
        if "readout" in mixer.state_dict():
            own = {"readout": mixer.readout.view(2, -1)[direction]}
        else:
            own = {"read.weight": (mixer.read, mixer.read_back)[direction].weight}
        one_way.load_state_dict(shared | own)
        outs.append(one_way.respond(x().flip(1) if direction else x(), None, SequenceContext(), 0)[0])
    expected = finished(mixer, outs[0] + outs[1].flip(1), x())
    assert relative_error(mixer(x())[0], expected) < 1e-12
    assert mixer.parameter_count() == sum(parameter.numel() for parameter in mixer.parameters())
    packed = mixer(x(batch=1), sequence=SequenceContext(boundaries([11, 0, 19])))[0]
    separate = [mixer(part)[0] for part in x(batch=1).split([11, 19], 1)]
    assert relative_error(packed, torch.cat(separate, 1)) < 1e-12
    shared = 2 * 100 * (2 * WIDTH * WIDTH)  # of the gate and the output, which both directions share
    assert mixer.flops(100) - shared == 2 * (one_way.flops(100) - shared)


def test_both_directions_carry_no_state_and_make_no_language_model():
    mixer = build("s4d", bidirectional=True)
    assert mixer(x())[1] == mixer.state_shapes(2) == {}
    with pytest.raises(ValueError, match="bidirectional state-space layer has seen no past"):
        mixer(x(), {"memory": x()})
    with pytest.raises(ValueError, match="a bidirectional layer can't run in them"):
        mixer(x(), sequence=SequenceContext().grouped(8))
    config = MIXERS.get("s5").Config(bidirectional=True)
    with pytest.raises(ConfigError, match=r"^model\.layers=s5: sees tokens to come"):
        LanguageModel(ModelConfig(layers=("s5",), depth=1, width=32, heads=2), {"s5": config}, 50)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_a_perturbation_has_the_size_it_is_given(size):
    norm = torch.linalg.matrix_norm(hippo_legs(size)[0], 2)
    for wanted in (0.03, 0.1, 0.28):
        found = sized_legs(size, wanted)
        assert found.size == pytest.approx(wanted * norm.item())
        assert found.values.real.max() < 0
    assert sized_legs(size, 0.28).condition < sized_legs(size, 0.1).condition < 20


def test_a_perturbation_that_leaves_no_stable_pairs_is_refused():
    with pytest.raises(ConfigError, match=r"^mixer\.s4_ptd\.perturbation=0\.001: leaves HiPPO-LegS of 8 states a real"):
        build("s4_ptd", state=8, perturbation=0.001)


def test_the_perturbation_of_a_trade_off_is_reached_by_its_key():
    assert build("s4_ptd", state=16, tradeoff=10.0).spectrum(16) is perturbed_legs(16, 10.0)


@pytest.mark.parametrize("name", ["jordan", "legt"])
@torch.enable_grad()
def test_any_matrix_is_diagonalized_after_a_perturbation_of_known_size(name):
    """A Jordan block has one eigenvector; LegT (HiPPO, arXiv 2008.07669, section 2.3) has badly conditioned ones."""
    n = torch.arange(12, dtype=torch.float64)
    above = n[:, None] < n
    legt = -(2 * n[:, None] + 1) * torch.where(above, torch.ones(()).double(), (-1.0) ** (n[:, None] - n))
    a = torch.diag(torch.ones(11, dtype=torch.float64), 1) if name == "jordan" else legt
    size = 0.05 * torch.linalg.matrix_norm(a, 2)
    drawn, found = (perturb_then_diagonalize(a, 0.05, steps=steps) for steps in (0, 60))
    assert torch.linalg.matrix_norm(found.added, 2).item() == pytest.approx(size.item())
    assert relative_error((found.vectors * found.values @ found.inverse).real, a + found.added) < 1e-10
    assert found.condition < drawn.condition / 2
    # Banks et al. 2019, theorem 1.1.
    assert drawn.condition < 4 * 12**1.5 * (1 + 1 / 0.05)


def test_the_perturbation_can_be_inspected_and_is_logged_once(caplog):
    report_perturbation.cache_clear()
    with caplog.at_level("INFO", "seqtrain.mixers"):
        with torch.device("meta"):
            build("s4_ptd", state=16)
        assert caplog.messages == []
        for mixer in (build("s4_ptd", state=16), build("s5_ptd", width=16, blocks=1, perturbation=0.1)):
            found = mixer.spectrum(16)
            assert found is sized_legs(16, 0.1)
    assert caplog.messages == [
        "HiPPO-LegS of 16 states perturbed by 16.3, 0.1 of its norm: condition number of the eigenvectors 12.5"
    ]
