"""The native kernels: against the float64 definition, and built, found again, refused and forked as promised."""

import ctypes
import gc
import logging
import multiprocessing
import threading
from dataclasses import replace

import pytest
import torch

from seqtrain.kernels import delta_rule, diagonal_scan, linear_attention, tensor_attention
from seqtrain.kernels.diagonal_scan import native as scan
from seqtrain.kernels.dispatch import reset_backend_choice
from seqtrain.kernels.gated_norm import native as norm
from seqtrain.kernels.linear_cross_entropy import native as cross_entropy
from seqtrain.kernels.native import build, cut, recurrence
from seqtrain.kernels.native import tensor_attention as native
from seqtrain.kernels.segments import by_segment
from seqtrain.kernels.short_convolution import native as convolution
from seqtrain.kernels.softmax_attention import native as attention
from seqtrain.kernels.sparse_mlp import native as sparse
from seqtrain.kernels.swiglu import native as swiglu
from seqtrain.testing import (
    assert_within,
    boundaries,
    compare_with_oracle,
    recurrence_inputs,
    relative_error,
    run_with_gradients,
)
from tests.kernels.contract_cases import Case

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=f"native {build.unavailable()}")

OPERATORS = {"linear_attention": linear_attention, "delta_rule": delta_rule}
ALL = OPERATORS | {"tensor_attention": tensor_attention}
TENSORS = Case(tensor_attention, {}, sizes={"H": 2, "K": 3})
DECAYS = [
    ("none", "mild"),
    *((shape, kind) for shape in ("BTH", "BTHK") for kind in ("mild", "wide", "strong", "spikes")),
]


def tensors_of(tokens, batch=1, **sizes):
    return replace(TENSORS, sizes=TENSORS.sizes | sizes).tensors(tokens, batch=batch)


def inputs(name, tokens, **options):
    return recurrence_inputs(tokens, beta=2.0 if name == "delta_rule" else None, **options)


def errors(name, tensors, **options):
    return compare_with_oracle(OPERATORS[name], tensors, backend="native", **options)


@pytest.mark.parametrize("tokens", [pytest.param(1024, marks=pytest.mark.full), 1100])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_cut_in_time_matches_the_definition(name, decay_shape, tokens, monkeypatch):
    cut_into = []
    run_pieces = cut.run_pieces
    monkeypatch.setattr(cut, "run_pieces", lambda *arguments: cut_into.append(arguments[-1]) or run_pieces(*arguments))
    # More threads than two heads and one block of columns can use.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    tensors = inputs(name, tokens, heads=2, key_width=20, value_width=12, decay_shape=decay_shape, decay="wide")
    found = errors(name, tensors)
    assert cut_into == [4]
    assert_within(found, torch.float32)


# 200 tokens of every decay, padded and not; any number of them, in blocks of value columns.
SEGMENTS = [(200, widths, decay) for widths in ((8, 5), (40, 33)) for decay in (*DECAYS, ("H", "mild"))]
SEGMENTS += [(tokens, (20, 70), (shape, "mild")) for tokens in (0, 1, 65) for shape in ("none", "BTH", "BTHK")]


@pytest.mark.parametrize(("tokens", "widths", "decay"), SEGMENTS)
def test_a_segment_s_map_and_what_it_reads_match_the_definition(tokens, widths, decay, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    sizes = {"batch": 2, "key_width": widths[0], "value_width": widths[1]}
    tensors = recurrence_inputs(tokens, decay_shape=decay[0], decay=decay[1], **sizes)
    for dtype in (torch.float32, torch.bfloat16):
        assert_within(compare_with_oracle(by_segment(linear_attention), tensors, dtype=dtype, backend="native"), dtype)


@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_blocks_of_columns_and_saved_states_change_nothing(name, decay_shape, monkeypatch):
    tensors = inputs(name, 300, states=2, heads=1, key_width=20, value_width=100, decay_shape=decay_shape)
    tensors = {key: x.float() for key, x in tensors.items()}
    options = {"cu_seqlens": boundaries([260, 40]), "backend": "native"}
    monkeypatch.setattr(recurrence, "BLOCK_COLUMNS", 10**9)
    whole = run_with_gradients(OPERATORS[name], tensors, **options)
    monkeypatch.setattr(recurrence, "BLOCK_COLUMNS", 16)
    monkeypatch.setattr(recurrence, "GROUP_CHUNKS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    parts = run_with_gradients(OPERATORS[name], tensors, **options)
    assert all(relative_error(parts[key], whole[key]) < 2e-6 for key in whole)


@pytest.mark.parametrize("decay_shape", ["none", "BTHK"])
def test_the_operators_pass_pytorch_s_own_check(decay_shape):
    tensors = {
        key: None if x is None else x.float() for key, x in inputs("delta_rule", 20, decay_shape=decay_shape).items()
    }
    leaves = [None if x is None else x.requires_grad_() for x in tensors.values()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(recurrence.RECURRENCE.op, (*leaves, None, 0.5, True), test_utils=checks)
    q, k, v, _, log_decay, state = leaves
    for parts in ((None, k, v), (q, None, v)):
        torch.library.opcheck(
            recurrence.RECURRENCE.op, (*parts, None, log_decay, state, None, 0.5, True), test_utils=checks
        )
    five = [x.float().requires_grad_() for x in tensors_of(20).values()]
    state = TENSORS.state(2, dtype=torch.float32, packed=True).requires_grad_()
    given = (*five, state, boundaries([9, 11]), 2, 0.5, True)
    torch.library.opcheck(native.TENSOR_ATTENTION.op, given, test_utils=checks)


def test_a_thousand_calls_leave_no_memory_behind():
    tensors = {key: x.float() for key, x in inputs("delta_rule", 40, heads=1).items()}

    def mapped():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(100):
        run_with_gradients(delta_rule, tensors, backend="native")
    gc.collect()
    before = mapped()
    for _ in range(1000):
        run_with_gradients(delta_rule, tensors, backend="native")
    gc.collect()
    assert mapped() - before < 8 << 20  # a call's scratch alone is about 0.2 MB


def test_several_threads_of_python_at_once():
    tensors = {key: x.float() for key, x in inputs("delta_rule", 150, heads=3).items()}
    expected = run_with_gradients(delta_rule, tensors, backend="native")
    results = []

    def work():
        results.append([run_with_gradients(delta_rule, tensors, backend="native") for _ in range(10)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    came = [result for each in results for result in each]
    assert len(came) == 40
    assert all(torch.equal(result[key], expected[key]) for result in came for key in expected)


def test_a_forked_process_computes_too(monkeypatch):
    tensors = {key: x.float() for key, x in inputs("delta_rule", 150, heads=3).items()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = delta_rule(**tensors, backend="native")[0]
    context = multiprocessing.get_context("fork")
    equal = context.Value("i", 0)

    def child():
        equal.value = int(torch.equal(delta_rule(**tensors, backend="native")[0], expected))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert equal.value == 1


def test_both_sides_agree_on_the_call():
    assert build.library().seqtrain_call_size() == ctypes.sizeof(recurrence._Call)
    assert build.library().seqtrain_attention_call_size() == ctypes.sizeof(attention._Call)
    assert build.library().seqtrain_tensor_call_size() == ctypes.sizeof(native._Call)
    assert build.library().seqtrain_norm_call_size() == ctypes.sizeof(norm._Call)
    assert build.library().seqtrain_convolution_call_size() == ctypes.sizeof(convolution._Call)
    assert build.library().seqtrain_scan_call_size() == ctypes.sizeof(scan._Call)
    assert build.library().seqtrain_swiglu_call_size() == ctypes.sizeof(swiglu._Call)
    assert build.library().seqtrain_softmax_call_size() == ctypes.sizeof(cross_entropy._Call)
    assert build.library().seqtrain_sparse_mlp_call_size() == ctypes.sizeof(sparse._Call)


@pytest.mark.parametrize(("key_width", "value_width"), [(1, 1), (6, 16), (4, 33)])
def test_tensor_attention_of_any_width(key_width, value_width):
    tensors = tensors_of(70, K=key_width, V=value_width)
    assert_within(compare_with_oracle(tensor_attention, tensors, backend="native"), torch.float32)


def test_tensor_attention_of_mixed_dtypes():
    mixed = {name: x.bfloat16() if name in ("q", "v2") else x.float() for name, x in tensors_of(130).items()}
    came, alike = (
        tensor_attention(**each, cu_seqlens=boundaries([0, 43, 87]), backend="native")[0]
        for each in (mixed, {name: x.float() for name, x in mixed.items()})
    )
    assert torch.equal(came, alike)


def test_threads_change_nothing_in_tensor_attention(monkeypatch):
    tensors, results = {name: x.float() for name, x in tensors_of(90, batch=3).items()}, []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run_with_gradients(tensor_attention, tensors, backend="native"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_long_sums_keep_their_precision():
    tensors = {name: x.abs() for name, x in tensors_of(6000, K=1).items()}
    came = tensor_attention(**{name: x.float() for name, x in tensors.items()}, backend="native")
    expected = tensor_attention(**tensors, backend="chunked")
    # One running sum of so many terms would be wrong by 1e-5.
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(came, expected, strict=True))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library loaded yet, an empty cache folder, and a compiler that takes no time: it writes its arguments."""
    build.library.cache_clear()
    build.unavailable.cache_clear()
    reset_backend_choice()
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    yield tmp_path
    monkeypatch.undo()
    build.library.cache_clear()
    build.unavailable.cache_clear()
    reset_backend_choice()


def compiler(folder, script):
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_auto_says_so_once_and_takes_chunked(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    tensors = {key: x.float() for key, x in inputs("delta_rule", 20).items()}
    with caplog.at_level(logging.INFO, "seqtrain.kernels"):
        out = [delta_rule(**tensors)[0] for _ in range(3)][-1]
    assert torch.equal(out, delta_rule(**tensors, backend="chunked")[0])
    said = [record.message for record in caplog.records if "native" in record.message]
    reason = "needs a C++ compiler (CXX=no-such-compiler is not found)"
    slower = "recurrences and tensor attention run slower, in PyTorch"
    assert said == [f"no native kernels: {reason}; {slower}", f"delta_rule: chunked (native {reason})"]
    with pytest.raises(ValueError, match=r"backend=native can't run here: native needs a C\+\+ compiler"):
        delta_rule(**tensors, backend="native")


def test_a_build_that_fails_gives_the_compiler_s_reason(fresh, monkeypatch):
    script = 'case "$*" in *-dM*) exit 0;; esac; echo "recurrence.cpp:1: error: out of luck" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(fresh, script))
    assert "recurrence.cpp:1: error: out of luck" in build.unavailable()
    assert not list((fresh / "cache").glob("*.so"))


def test_a_cache_that_can_t_be_written_is_a_reason(fresh, monkeypatch):
    (fresh / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("CXX", compiler(fresh, "exit 0"))
    assert "can't be built" in build.unavailable()


def test_processes_that_start_together_build_once(fresh, monkeypatch):
    count = fresh / "builds"
    # What it writes is no library: loading fails, after the build that is counted here.
    script = (
        f'case "$*" in *-dM*) exit 0;; esac; echo built >> {count}; sleep 0.3; for last; do :; done; echo x > "$last"'
    )
    monkeypatch.setenv("CXX", compiler(fresh, script))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build.unavailable) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert count.read_text().splitlines() == ["built"]
    assert "can't be loaded" in build.unavailable()


@pytest.mark.parametrize(
    ("capability", "missing", "expected"),
    [
        ("AVX512", set(), ["x86-64-v4", "x86-64-v3"]),
        ("AVX2", set(), ["x86-64-v3"]),  # as ATEN_CPU_CAPABILITY=avx2 asks
        ("AVX512", {"avx512bw"}, ["x86-64-v3"]),
        ("AVX2", {"bmi2"}, []),
        ("DEFAULT", set(), []),
    ],
)
def test_a_prebuilt_library_fits_the_processor(monkeypatch, capability, missing, expected):
    every = set().union(*(needed for _, needed in build.LEVELS.values()))
    monkeypatch.setattr(build, "_processor_features", lambda: every - missing)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert build._levels() == expected


def test_a_prebuilt_library_that_does_not_load_is_compiled_instead(fresh, monkeypatch, caplog):
    monkeypatch.setattr(build, "PREBUILT", fresh)
    monkeypatch.setattr(build, "_levels", lambda: ["x86-64-v4", "x86-64-v3"])
    (fresh / "x86-64-v3.so").write_text("no library")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, "seqtrain.kernels"):
        assert "needs a C++ compiler" in build.unavailable()
    assert "native kernels: x86-64-v3.so can't be loaded" in caplog.text


@pytest.mark.parametrize("name", OPERATORS)
def test_parts_of_a_projection_are_read_where_they_lie(name):
    mixed = torch.randn(2, 70, 56, generator=torch.Generator().manual_seed(0)).sigmoid()
    v, key, gates = mixed.split([32, 16, 8], 2)
    # One key and one query for all heads.
    parts = [x[:, :, None].expand(-1, -1, 4, -1) for x in key.split(8, 2)] + [v.unflatten(2, (4, 8))]
    parts += [gates[:, :, :4]] if name == "delta_rule" else []
    found = []
    for each in (parts, [x.contiguous() for x in parts]):
        leaves = [x.detach().requires_grad_() for x in each]
        out, state = OPERATORS[name](*leaves, backend="native")
        found.append((out, state, *torch.autograd.grad(out.square().sum() + state.sum(), leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("angles", "limit"), [(3.0, 5e-7), (1e3, 2e-6), (1e5, 2e-5)])
def test_complex_decays_of_any_angle(angles, limit):
    generator = torch.Generator().manual_seed(0)
    log_a = torch.complex(
        -torch.rand(1, 40, 37, generator=generator), angles * (2 * torch.rand(1, 40, 37, generator=generator) - 1)
    )
    x = torch.randn(1, 40, 37, dtype=torch.complex64, generator=generator)
    came = run_with_gradients(diagonal_scan, {"x": x, "log_a": log_a}, backend="native")
    wide = {"x": x.to(torch.complex128), "log_a": log_a.to(torch.complex128)}
    exact = run_with_gradients(diagonal_scan, wide, backend="chunked")
    # The angles themselves are exact: none is rounded on the way.
    errors = {name: relative_error(came[name], exact[name]) for name in exact}
    assert max(errors.values()) < limit, errors
