"""Every row at a tiny effort, and the measurements that train nothing against what they stand for."""

import math

import pytest
import torch

from experiments.fidelity import ROWS, Effort, entropy, fourier, match3, recall
from experiments.fidelity.legs import StateSystem, legs_systems
from experiments.fidelity.tensor_time import slope
from seqtrain.data.synthetic import make_task
from seqtrain.layers import elu
from seqtrain.mixers.common.hippo import normal_legs
from seqtrain.testing import relative_error

TINY = Effort(seeds=(0,), scale=0.002)
# Figures of each row; the slow one has its own test.
FIGURES = {"recall": 8, "parity": 3, "match3": 12, "query_gradient": 2, "entropy": 2, "tensor_time": 1}
FIGURES |= {"nalaformer": 3, "dydila": 2, "tcnca": 2, "liger": 6, "heads": 10, "bounded_entries": 8, "groups": 2}
FIGURES |= {
    "centrality": 1,
    "rounding": 13,
    "steps": 4,
    "all_scan": 3,
    "inverse_permutation": 2,
    "first_token": 2,
    "spark": 4,
    "clouds": 4,
    "optimizers": 4,
    "digits": 2,
}

TRAINED = {"recall": pytest.mark.full, "match3": pytest.mark.full, "parity": pytest.mark.all}
TRAINED |= {"inverse_permutation": pytest.mark.all, "clouds": pytest.mark.all}
TRAINED |= {"digits": pytest.mark.all}
# Those that cost more than a second.
SLOW = {
    "steps": pytest.mark.all,
    "groups": pytest.mark.all,
    "heads": pytest.mark.all,
    "liger": pytest.mark.all,
    "rounding": pytest.mark.all,
    "spark": pytest.mark.all,
    "optimizers": pytest.mark.all,
    "first_token": pytest.mark.all,
}


def test_every_row_is_tested():
    assert {*FIGURES, "fourier"} == set(ROWS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=(TRAINED | SLOW).get(name, ())) for name in FIGURES])
def test_a_row_gives_its_figures(name):
    figures = list(ROWS[name].measure(TINY))
    assert len(figures) == FIGURES[name]
    assert len({figure.what for figure in figures}) == len(figures)
    assert all(len(figure.values) == 1 and math.isfinite(figure.mean) for figure in figures)
    assert any(figure.bounds for figure in figures)
    assert any(figure.curves for figure in figures)
    if name in TRAINED:
        trained = [figure for figure in figures if figure.steps]
        assert trained
        # The encoders of digits carry no state.
        assert all(figure.parameters > 0 and (figure.state_bytes > 0 or name == "digits") for figure in trained)
        assert "recipe" in ROWS[name].settings


def test_a_row_says_what_it_claims_and_how():
    for name, row in ROWS.items():
        assert row.name == name
        assert any(source in row.claim for source in row.sources), name
        assert row.method


@pytest.mark.parametrize("degree", [None, 2, 4])
def test_the_construction_is_tensor_attention_of_sinusoids(degree):
    angles = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 * math.pi
    (x, y, z), temperature = angles, 3.0
    query = torch.stack([x.cos(), -x.cos(), -x.sin(), -x.sin()], -1) / math.sqrt(2)
    first = torch.stack([y.cos(), y.sin(), y.cos(), y.sin()], -1) / math.sqrt(2)
    second = torch.stack([z.cos(), z.sin(), z.sin(), z.cos()], -1) / math.sqrt(2)
    for lengths in (query, first, second):
        torch.testing.assert_close(lengths.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    exponent = temperature * torch.einsum("tr,ir,jr->tij", query, first, second)
    grown = sum(exponent**power / math.factorial(power) for power in range(degree + 1)) if degree else exponent.exp()
    expected = grown.sum((1, 2)) if degree else grown.sum((1, 2)).log()
    cosines = x[:, None, None] + y[None, :, None] + z[None, None]
    torch.testing.assert_close(match3.pair_scores(cosines, temperature, degree), expected)


def test_exp_finds_triples_and_its_polynomial_does_not():
    task = make_task("match3", {"modulus": 31, "numbers": 7})
    assert match3.constructed_accuracy(task, 31, 7, None, rows=64, seed=0) == 1.0
    assert match3.constructed_accuracy(task, 31, 7, 2, rows=64, seed=0) < 0.8


def test_the_best_threshold_is_found():
    positive = torch.tensor([True, False, True, False, False])
    assert match3.best_threshold(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), positive) == 1.0
    assert match3.best_threshold(torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0]), positive) == pytest.approx(0.8)
    assert match3.best_threshold(-torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), positive) == pytest.approx(0.6)


def test_a_state_holds_what_its_keys_let_it():
    held = {
        (positive, beta): recall.share_held(positive=positive, beta=beta, rows=4, width=32, seed=0)
        for positive, beta in ((False, None), (True, None), (False, 1.0))
    }
    # Keys after elu + 1 point nearly the same way; a step of 1 writes over what random keys share.
    assert held[False, None] > held[False, 1.0] > held[True, None]
    # Keys in so many dimensions hardly overlap.
    assert recall.share_held(positive=False, beta=None, rows=1, width=512, seed=0) == 1.0
    assert recall.share_held(positive=False, beta=1.0, rows=1, width=2048, seed=0) == 1.0


def test_rows_without_training_hold_what_they_claim():
    for name in ("query_gradient", "entropy"):
        assert all(figure.holds for figure in ROWS[name].measure(Effort(seeds=(0,))))


def test_entropy_of_known_weights():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [-3.0, 0.5, 0.5, 0.0]])
    expected = torch.tensor([math.log(4), 0.0, math.log(2)])
    torch.testing.assert_close(entropy.entropy(weights), expected)


def test_divided_weights_sum_to_one_over_the_past():
    q, k = torch.randn(2, 1, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    weights = entropy.divided_weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    assert bool((weights.triu(1) == 0).all())
    score = elu(q[0, 5, 1]) @ elu(k[0, 2, 1])
    total = (elu(k[0, :, 1]) @ elu(q[0, 5, 1])).sum()
    torch.testing.assert_close(weights[0, 1, 5, 2], score / total)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_slope_is_the_exponent(power):
    lengths = [128, 256, 1024]
    assert slope(lengths, [3 * length**power for length in lengths]) == pytest.approx(power)


def test_fourier_modes_hit_the_normal_part_and_not_the_perturbed(monkeypatch):
    # Fewer states, tokens and modes than the row has.
    monkeypatch.setattr(fourier, "SIZE", 16)
    monkeypatch.setattr(fourier, "TOKENS", 300)
    assert float(fourier.modes().max()) * fourier.STEP < math.pi
    errors = fourier.output_errors(0)
    assert len(errors["normal"]) == len(errors["perturbed"]) == len(fourier.modes())
    assert max(errors["perturbed"]) < max(errors["normal"]) / 3
    assert min(errors["perturbed"]) > 0


@pytest.mark.parametrize("size", [16, 64])
def test_a_perturbed_hippo_answers_as_hippo_at_every_frequency_and_its_normal_part_does_not(size):
    """The paper's theorems 2 and 3: weak against strong convergence."""
    spikes = normal_legs(size).values.imag
    frequency = torch.cat([torch.logspace(-2, 5, 200, dtype=torch.float64), spikes])
    systems = legs_systems(size, 0.03)
    hippo = systems["hippo"].response(frequency)
    error = {name: (systems[name].response(frequency) - hippo).abs() for name in ("normal", "perturbed")}
    assert error["perturbed"].max() < 0.02
    assert error["normal"].max() > 1
    # At low frequencies, which is where smooth inputs are, both are near.
    assert error["normal"][frequency < 1].max() < 0.1


def test_an_output_is_the_recurrence_and_tends_to_the_response():
    torch.manual_seed(0)
    system = StateSystem(torch.randn(3, 3).double() * 0.2 - torch.eye(3), *torch.randn(2, 3).double())
    step, w = 0.01, 2.0
    time = torch.arange(4000, dtype=torch.float64) * step
    out = system.output(torch.cos(w * time), step)
    response = system.response(torch.tensor([w]))[0]
    expected = (response * torch.exp(1j * w * (time + step / 2))).real  # an input held for a step lags half of one
    assert relative_error(out[2000:], expected[2000:]) < 1e-3
