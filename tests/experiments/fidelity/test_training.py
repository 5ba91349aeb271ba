"""Training small models on tasks: deterministic, staged, scored on rows that were not trained on."""

import pytest
import torch
from torch import nn

from experiments.fidelity import Bounds, Effort
from experiments.fidelity.training import Recipe, Stage, score, small_model, train, train_seeds
from seqtrain.data.synthetic import make_task


def model(seed: int = 0, **fields):
    task = make_task("parity")
    return small_model(task, "delta_net", fields, width=8, heads=1, depth=1, initializer_range=0.1, seed=seed)


class Echo(nn.Module):
    """Gives the token it reads as the answer: right wherever the parity of all bits so far equals the last bit."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))

    def forward(self, tokens, *, all_logits):
        assert all_logits
        return self.weight[tokens], None


def stages(steps: int = 4, **options):
    return [Stage(make_task("parity"), length=8, steps=steps, batch=4, **options)]


def test_the_same_seed_trains_the_same_model():
    first, second, other = model(), model(), model(seed=1)
    curves = [train(net, stages(), Recipe(), seed=seed).curve for net, seed in ((first, 0), (second, 0), (other, 1))]
    assert curves[0] == curves[1] != curves[2]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_training_learns_what_can_be_learned():
    # One bit per row: the parity is the bit itself.
    task = make_task("parity")
    net = model()
    trained = train(net, [Stage(task, length=1, steps=60, batch=16)], Recipe(lr=1e-2, warmup=5), seed=0)
    assert trained.steps == len(trained.curve) == 60
    assert score(net, task, length=1, rows=64) == 1.0


def test_a_stage_ends_when_enough_is_right():
    task = make_task("parity")
    found = train(Echo(), [Stage(task, length=1, steps=100, batch=4, enough=0.99)], Recipe(), seed=0)
    assert found.steps == 20
    assert train(Echo(), [Stage(task, length=1, steps=30, batch=4)], Recipe(), seed=0).steps == 30


def test_scores_count_answers_from_the_first_token_wanted():
    task = make_task("parity")
    # The first bit's parity is the bit; from the second on half the rows differ.
    assert score(Echo(), task, length=1, rows=70) == 1.0
    late = score(Echo(), task, length=40, rows=70, first=30)
    assert late == pytest.approx(0.5, abs=0.1)
    assert score(Echo(), task, length=40, rows=70) > late


def test_a_figure_has_one_value_a_seed_and_says_what_training_took():
    effort = Effort(seeds=(0, 5))
    built = []

    def build(seed):
        built.append(seed)
        return model(seed)

    figure = train_seeds("net", build, stages(), Recipe(), lambda net: len(built) / 10, effort, Bounds(), 0.5)
    assert built == [0, 5]
    assert figure.values == (0.1, 0.2)
    assert figure.steps == (4, 4)
    assert figure.length == 8
    assert figure.chance == 0.5
    assert figure.parameters == sum(parameter.numel() for parameter in model().parameters())
    # One head of 8 x 8, and the last 3 inputs of the convolution of q, k and v.
    assert figure.state_bytes == 4 * (8 * 8 + 3 * 3 * 8)
    assert len(figure.seconds) == 2
    [curve] = figure.curves
    assert curve.x == (1, 2, 3, 4)
