"""How far each diagonal form of HiPPO-LegS is from it, in its answers."""

import pytest
import torch

from experiments.fidelity.legs import StateSystem, legs_systems
from seqtrain.mixers.common.hippo import normal_legs
from seqtrain.testing import relative_error


@pytest.mark.parametrize("size", [16, 64])
def test_a_perturbed_hippo_answers_as_hippo_at_every_frequency_and_its_normal_part_does_not(size):
    """The paper's theorems 2 and 3: weak against strong convergence."""
    spikes = normal_legs(size).values.imag
    frequency = torch.cat([torch.logspace(-2, 5, 200, dtype=torch.float64), spikes])
    systems = legs_systems(size, 10.0)
    hippo = systems["hippo"].response(frequency)
    error = {name: (systems[name].response(frequency) - hippo).abs() for name in ("normal", "perturbed")}
    assert error["perturbed"].max() < 0.02
    assert error["normal"].max() > 1
    # At low frequencies, which is where smooth inputs are, both are near.
    assert error["normal"][frequency < 1].max() < 0.1


def test_a_spike_shows_in_the_output():
    systems, step = legs_systems(32, 10.0), 0.002
    time = torch.arange(2000, dtype=torch.float64)
    spikes = normal_legs(32).values.imag
    answer = systems["normal"].response(spikes) - systems["hippo"].response(spikes)
    worst = spikes[answer.abs().argmax()]
    mode = torch.cos(worst * step * time)
    outputs = {name: system.output(mode, step) for name, system in systems.items()}
    error = {name: (outputs[name] - outputs["hippo"]).norm().item() for name in ("normal", "perturbed")}
    assert error["perturbed"] < error["normal"] / 30


def test_an_output_is_the_recurrence_and_tends_to_the_response():
    torch.manual_seed(0)
    system = StateSystem(torch.randn(3, 3).double() * 0.2 - torch.eye(3), *torch.randn(2, 3).double())
    step, w = 0.01, 2.0
    time = torch.arange(4000, dtype=torch.float64) * step
    out = system.output(torch.cos(w * time), step)
    response = system.response(torch.tensor([w]))[0]
    expected = (response * torch.exp(1j * w * (time + step / 2))).real  # an input held for a step lags half of one
    assert relative_error(out[2000:], expected[2000:]) < 1e-3
