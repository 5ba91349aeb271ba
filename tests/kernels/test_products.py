"""Products of linear layers: each routine's result and gradients, which is chosen, and how a run is told."""

import logging

import pytest
import torch
import torch.nn.functional as F

from seqtrain.kernels import products
from seqtrain.layers import Linear
from seqtrain.testing import relative_error

ONEDNN = pytest.mark.skipif(products.unavailable("onednn") is not None, reason="PyTorch without oneDNN")
ROUTINES = ["torch", pytest.param("onednn", marks=ONEDNN)]


@pytest.fixture(autouse=True)
def any_size(monkeypatch, tmp_path):
    monkeypatch.setattr(products, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "_chosen", "")
    products.fastest.cache_clear()
    yield
    products.fastest.cache_clear()


def layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 40, 24), (56, 24), (56,)))
    return [each.requires_grad_() for each in (x, weight, bias)]


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_result_and_gradients_of_both_orders(routine, with_bias, monkeypatch):
    products.use(routine)
    used = []
    inner = products._ROUTINES[routine]
    monkeypatch.setitem(products._ROUTINES, routine, lambda a, b: used.append(a.shape) or inner(a, b))
    given = layer() if with_bias else layer()[:2]
    wide = [each.detach().double().requires_grad_() for each in given]
    found = []
    for tensors, function in ((given, products.linear), (wide, F.linear)):
        out = function(*tensors)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), tensors)
        found.append([out, *first, *second])
    assert max(relative_error(came, exact) for came, exact in zip(*found, strict=True)) < 1e-5
    assert bool(used) == (routine == "onednn")


@ONEDNN
def test_a_user_s_own_loop_gets_it(monkeypatch):
    asked = []
    times = {"torch": 2.0, "onednn": 1.0}
    monkeypatch.setattr(products, "measure", lambda routine, *_, **__: asked.append(routine) or [[times[routine]]])
    module = Linear(24, 56)
    module(layer()[0])
    assert asked == ["torch", "onednn"] * products.REPEATS
    assert products.chosen() == "onednn"
    module(layer()[0])
    assert len(asked) == 2 * products.REPEATS


@pytest.mark.parametrize("faster", ["torch", "onednn"])
def test_the_faster_one_by_a_margin(faster, monkeypatch):
    times = {"torch": 1.0, "onednn": 0.9 if faster == "onednn" else 0.97}
    monkeypatch.setattr(products, "unavailable", lambda routine: None)
    monkeypatch.setattr(products, "measure", lambda routine, *_, **__: [[times[routine]]])
    assert products.chosen() == faster


@ONEDNN
@pytest.mark.parametrize("damage", [None, b"", b"[]", b"{"])
def test_every_process_of_a_machine_takes_what_the_first_one_found(monkeypatch, tmp_path, damage):
    times = {"torch": 1.0, "onednn": 0.5}
    monkeypatch.setattr(products, "measure", lambda routine, *_, **__: [[times[routine]]])
    assert products.fastest() == ("onednn", 2.0)
    [file] = (tmp_path / "cache").iterdir()
    if damage is not None:
        file.write_bytes(damage)
    times["onednn"] = 2.0
    products.fastest.cache_clear()
    assert products.fastest() == (("onednn", 2.0) if damage is None else ("torch", 1.0))


def test_where_it_can_t_be_used_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(products, "unavailable", lambda routine: "is not here" if routine == "onednn" else None)
    with caplog.at_level(logging.INFO, "seqtrain.kernels"):
        products.use("onednn")
    assert [record.message for record in caplog.records] == [
        "linear layers: onednn is not here; torch's, whose last bits differ"
    ]
    assert products.chosen() == "torch"


@pytest.mark.parametrize("kind", ["double", "autocast", "small"])
def test_others_are_left_to_pytorch(kind, monkeypatch):
    monkeypatch.setattr(products, "chosen", lambda: pytest.fail("was asked"))
    monkeypatch.setattr(products, "LEAST", 10**9 if kind == "small" else 0)
    x, weight, _ = layer()
    if kind == "double":
        x, weight = x.double(), weight.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
