"""A parameter's first numbers follow from the seed and its name, and from nothing else."""

import pytest
import torch
from torch import nn

from seqtrain.initialization import drawn, initializers_of, materialize
from seqtrain.models import LanguageModel, ModelConfig


def model(*layers, seed=3, **sizes):
    shape = {"depth": len(layers), "width": 16, "heads": 2, **sizes}
    return LanguageModel(ModelConfig(layers=layers, **shape), {}, 40, seed=seed)


def test_numbers_follow_from_seed_and_name_alone():
    # Other layers after it, another vocabulary, experts: none of it is drawn from the same generator.
    few = dict(model("gla", "s5").named_parameters())
    more = dict(model("gla", "attention", tie_embeddings=False, experts=4, mlps=("mlp", "moe")).named_parameters())
    shared = [name for name in few if name.startswith(("blocks.0.", "embedding", "norm"))]
    assert len(shared) > 8
    assert all(torch.equal(few[name], more[name]) for name in shared)
    again, other = (dict(model("gla", "s5", seed=seed).named_parameters()) for seed in (3, 4))
    assert all(torch.equal(few[name], again[name]) for name in few)
    assert not torch.equal(few["embedding.weight"], other["embedding.weight"])
    # No two parameters have the same generator, and what writes to the residual stream is scaled.
    assert not torch.equal(few["blocks.0.mlp.up.weight"], few["blocks.1.mlp.up.weight"])
    assert few["blocks.0.mlp.out.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.1)


def test_without_a_seed_torchs_own_decides():
    torch.manual_seed(5)
    first, second = model("gla", seed=None), model("gla", seed=None)
    torch.manual_seed(5)
    again = model("gla", seed=None)
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_parameters_get_memory_one_by_one_and_stay_the_same_objects():
    with torch.device("meta"):
        network = model("gla", "mamba2")
    before = dict(network.named_parameters())
    for done, (name, parameter) in enumerate(materialize(network, network.initial_weights(3), torch.device("cpu"))):
        assert parameter is before[name]
        assert sum(not each.is_meta for each in before.values()) == done + 1
    expected = dict(model("gla", "mamba2").named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in network.named_parameters())
    assert network.head.weight is network.embedding.weight


def test_a_parameter_of_which_nothing_is_said_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3))

    with torch.device("meta"):
        holder = nn.ModuleDict({"odd": Odd()})
    with pytest.raises(ValueError, match=r"odd\.scale: Odd does not say how it begins; name it in Odd\.initializers"):
        list(materialize(holder, drawn(holder, initializers_of(holder, 0.02), 0), torch.device("cpu")))
