"""Activations in the CPU's memory: the same bits, and what is moved."""

import pytest
import torch

from seqtrain.errors import ConfigError
from seqtrain.runtime import offload
from seqtrain.runtime.checks import check
from seqtrain.runtime.offload import offload_activations
from tests.models.tiny import batch, build
from tests.runtime.runtime_cases import small_config


@pytest.mark.all
@pytest.mark.parametrize("recompute", [(), ("norm", "projection"), ("block",)], ids=",".join)
def test_same_bits_and_weights_stay(monkeypatch, recompute):
    def gradients(offloaded):
        model = build(("gated_delta_net", "attention"), recompute=recompute)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        if offloaded:
            offload_activations(model)
        torch.autograd.backward(model(*batch(tokens=70)))
        return weights, [weight.grad for weight in model.parameters()]

    moved = []

    class Watched(offload.save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda x: (moved.append(x.untyped_storage().data_ptr()), pack(x))[1]

    monkeypatch.setattr(offload, "save_on_cpu", Watched)
    monkeypatch.setattr(offload.Offloaded.__init__, "__kwdefaults__", {"least": 1})
    _, plain = gradients(False)
    weights, found = gradients(True)
    assert moved
    assert not weights & set(moved)
    assert all(map(torch.equal, plain, found))


def test_refused_on_cpus(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.offload_activations=true: torch sees no CUDA device"):
        check(small_config(tmp_path, train={"offload_activations": True}))
