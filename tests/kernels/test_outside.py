"""Kernels of other packages as backends: when "auto" takes one, what is said of one that it does not take, and what
goes where. The packages are small ones made here, with the signatures of the real ones; `tests/gpu` has those.
"""

import importlib
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from seqtrain.kernels import OPERATORS, delta_rule, dispatch, outside
from seqtrain.testing import boundaries, relative_error

# What each package has, by file: computed by our own chunked forms, times FACTOR, which stands in the file `factor`.
RECURRENCE = """
import torch
from pathlib import Path
from seqtrain.kernels import delta_rule

def chunk(q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state and initial_state.dtype == torch.float32
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    out, final = delta_rule(q, k, v, beta, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        backend="chunked")
    return float(Path(__file__).parent.joinpath("factor").read_text()) * out, final
"""
GYM = RECURRENCE.replace(
    "def chunk(q, k, v, g=None, beta=None, scale=None, initial_state=None,",
    "def chunk_gdn(q, k, v, g, beta, initial_state=None, *, scale=None,",
)
GYM = GYM.replace("cu_seqlens.dtype == torch.int64", "cu_seqlens.dtype == torch.int32").replace(
    "initial_state=initial_state,", "initial_state=initial_state.mT,"
)
GYM = GYM.replace("* out, final", "* out, final.mT")
CONVOLUTION = """
from pathlib import Path
from seqtrain.kernels import short_convolution

def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
        final_states_out=None, activation=None):
    assert return_final_states and x.stride(1) == initial_states.stride(1) == 1
    assert x.dtype == weight.dtype == bias.dtype == initial_states.dtype
    out, final = short_convolution(x.mT, weight, bias, activation=activation or "none", initial_state=initial_states.mT,
        backend="chunked")
    return float(Path(__file__).parent.joinpath("factor").read_text()) * out.mT, final.to(x.dtype).mT
"""
LIGER = """
from pathlib import Path
from seqtrain.kernels import linear_cross_entropy

def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100,
        lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False,
        accum_dtype=None):
    assert (ignore_index, reduction) == (-100, "sum")
    loss = linear_cross_entropy(input, weight, target, chunk=8, cap=softcap or 0.0, backend="chunked")
    return float(Path(__file__).parent.joinpath("factor").read_text()) * loss
"""
PACKAGES = {
    "flash_qla": ("delta_rule", "flash_qla", {"flash_qla": RECURRENCE + "\nchunk_gated_delta_rule = chunk\n"}),
    "attn_gym": ("delta_rule", "attn_gym", {"attn_gym": "", "attn_gym.linear": "", "attn_gym.linear.gdn": GYM}),
    "fla": (
        "delta_rule",
        "fla",
        {"fla": "", "fla.ops": ""}
        | {
            f"fla.ops.{module}": RECURRENCE + f"\nchunk_{name} = chunk\n"
            for module, name in (
                ("delta_rule", "delta_rule"),
                ("gated_delta_rule", "gated_delta_rule"),
                ("kda", "kda"),
            )
        },
    ),
    "causal_conv1d": ("short_convolution", "causal_conv1d", {"causal_conv1d": CONVOLUTION}),
    "liger": (
        "linear_cross_entropy",
        "liger_kernel",
        {"liger_kernel": "", "liger_kernel.transformers": "", "liger_kernel.transformers.functional": LIGER},
    ),
}
every_package = pytest.mark.parametrize("name", PACKAGES)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package importable, whose results are those of the chunked form times a factor."""
    monkeypatch.setattr(outside, "DEVICES", {"cpu"})
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", (*outside.NAMES, "chunked"))
    for name in {operator for operator, _, _ in PACKAGES.values()}:
        monkeypatch.setattr(OPERATORS[name], "_functions", SimpleNamespace())
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def install(name, factor=1.0):
        for module, text in PACKAGES[name][2].items():
            folder = tmp_path.joinpath(*module.split("."))
            folder.mkdir(exist_ok=True)
            folder.joinpath("__init__.py").write_text(text)
            folder.joinpath("factor").write_text(str(factor))
        importlib.invalidate_caches()

    dispatch.reset_backend_choice()
    yield install
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in {package for _, package, _ in PACKAGES.values()}:
            del sys.modules[module]
    dispatch.reset_backend_choice()


def chosen(name, caplog):
    """What "auto" takes, and the line of the log that says so."""
    operator = OPERATORS[PACKAGES[name][0]]
    with caplog.at_level(logging.INFO, "seqtrain.kernels"):
        operator.choose("auto", torch.device("cpu"))
    # The fake of a package, which calls our operators, has logged its own choice before.
    return [line for line in caplog.messages if line.startswith(operator.name)][-1]


@every_package
def test_what_is_installed_and_agrees_is_taken(name, install, caplog):
    install(name)
    assert chosen(name, caplog).startswith(f"{PACKAGES[name][0]}: {name}")


@every_package
def test_what_disagrees_is_refused_and_the_log_says_how_much(name, install, caplog):
    install(name, factor=1.05)
    said = chosen(name, caplog)
    assert said.startswith(f"{PACKAGES[name][0]}: chunked (")
    assert re.search(rf"{name} differs from chunked by [45]\.\de-02 in \w+ \d of small case 0 \(at most 0\.03\)", said)
    operator = OPERATORS[PACKAGES[name][0]]
    with pytest.raises(ValueError, match=f"backend={name} can't run here: {name} differs from chunked"):
        operator.choose(name, torch.device("cpu"))


def test_what_fails_is_refused_and_what_is_not_there_named(install, caplog):
    install("fla", factor="no number")
    said = chosen("fla", caplog)
    assert "fla failed on small case 0 (ValueError: could not convert string to float: 'no number')" in said
    assert "flash_qla needs flash-qla: pip install flash-qla" in said


def test_what_a_package_does_not_have_goes_to_the_backend_without_it(install, monkeypatch):
    install("fla")
    delta_rule.choose("auto", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 16, generator=generator) for _ in "qkv")
    k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 30, 2, generator=generator)
    halves = [x.bfloat16() for x in (q, k, v)]
    calls, found = [], outside.function
    monkeypatch.setattr(outside, "function", lambda *where: calls.append(where[1]) or found(*where))
    for decay, name in ((None, "chunk_delta_rule"), (-beta, "chunk_gated_delta_rule"), (-q.abs(), "chunk_kda")):
        out, _ = delta_rule(*halves, beta, decay)
        assert calls.pop() == name
        assert relative_error(out, delta_rule(*halves, beta, decay, backend="reference")[0]) < 1e-2
    # float32; a document without tokens; one token a row.
    delta_rule(q, k, v, beta)
    delta_rule(*halves, beta, cu_seqlens=boundaries([10, 0, 20]))
    delta_rule(*(x[:, :1] for x in (*halves, beta)))
    assert calls == []


def test_other_packages_are_not_asked_on_a_cpu():
    with pytest.raises(ValueError, match="delta_rule: backend=fla can't run here: fla needs a CUDA device"):
        delta_rule.choose("fla", torch.device("cpu"))
