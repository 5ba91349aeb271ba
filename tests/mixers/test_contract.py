"""What every registered mixer promises: one suite, so that a new mixer is tested by being there."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.mixers.common.counting import CountingContext
from seqtrain.parallel import SequenceContext, ShardedSequence, flush_scans
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import boundaries, relative_error

WIDTH, HEADS = 32, 2
# Settings that make a tiny layer show what the default would not at these lengths.
TINY = {
    "sliding_attention": {"window": 9},
    "streaming_attention": {"window": 9, "sinks": 2},
    "linearized_attention": {"window": 9, "sinks": 2},
    **{f"liger_{name}": {"window": 9} for name in ("gla", "gsa", "hgrn2")},
    "gsa": {"slots": 5},
    "tcnca": {"chunk": 9, "dilation": 3},
    "mamba2": {"state": 8},
    "mamba3": {"state": 8},
    "tensor_attention": {"key": 3},
    "parallel": {"branches": ({"mixer": "mamba2", "options": {"state": 8}, "in_scale": 0.5}, {"mixer": "attention"})},
}
VARIANTS = [
    ("linear_attention", {"feature_map": "taylor2", "expand_key": 0.25, "expand_value": 0.5}),
    ("linear_attention", {"feature_map": "identity", "normalizer": "rms", "conv_width": 4}),
    ("linear_attention", {"feature_map": "relu", "normalizer": "none"}),
    ("gla", {"conv_width": 3}),
    ("delta_net", {"allow_negative_eigenvalues": True, "conv_width": 0}),
    ("mamba2", {"groups": 2, "state": 4, "expand": 1.0}),
    ("mamba2", {"state": 4, "gate": "after_norm", "step_min": 0.01, "step_max": 0.5}),
    ("mamba2", {"state": 4, "head_width": 7, "gate": "no_norm", "in_bias": True, "scales": (2.0, 1.0, 0.7, 0.5, 3.0)}),
    ("mamba3", {"state": 4, "groups": 2, "turning": 1.0, "expand": 1.0}),
    ("gated_delta_net2", {"allow_negative_eigenvalues": True, "conv_width": 0, "expand_value": 0.5}),
    ("mamba", {"state": 3, "rank": 5, "norms": "learned", "bias": True, "conv_bias": False}),
    ("mamba", {"state": 4, "inner_width": 15, "norms": "plain"}),
    ("s4d", {"initialization": "inv", "discretization": "bilinear"}),
    ("s4d", {"initialization": "legs", "state": 6}),
    ("s5", {"discretization": "bilinear"}),
    ("intra_hybrid", {"window": 9, "full": True}),
    ("intra_hybrid", {"window": 9, "tied_gate": True, "feature_map": "sigmoid", "learned_sinks": 3, "query_group": 2}),
    ("intra_hybrid", {"window": 9, "sinks": 2, "feature_map": "relu"}),
    ("intra_hybrid", {"window": 0}),
    ("gla", {"feature_map": "sigmoid", "output_gate": False}),
    ("linearized_attention", {"window": 0, "memory": "gla", "feature_map": "relu", "combine": "norms"}),
    ("tensor_attention", {"key": 3, "order": 4}),
    ("attention", {"kept_keys": 200, "predict_width": 2}),
    ("streaming_attention", {"window": 9, "sinks": 1, "learned_sinks": 3}),
    ("linearized_attention", {"window": 9, "memory": "gla", "tied_gate": True, "combine": "norms"}),
    ("linearized_attention", {"window": 0, "memory": "kda", "combine": "norms"}),
    ("linearized_attention", {"window": 5, "sinks": 2, "memory": "gsa", "slots": 3, "query_group": 2}),
    ("linearized_attention", {"window": 0, "memory": "hgrn2", "query_group": 2, "qk_norm": True}),
    ("min_gru", {"candidate": "linear", "expand": 0.5}),
    ("rg_lru", {"expand": 1.5, "conv_width": 2}),
    ("rg_lru", {"head_width": 11, "whole_start": True}),
    ("gated_convolution", {"conv_width": 5, "bias": True}),
    (
        "tcnca",
        {"residual": "plain", "chunk": 64, "conv_width": 2, "conv_depth": 1, "expand_key": 1.0, "expand_value": 1.0},
    ),
    ("kda", {"low_rank": False, "log_decay_bound": -5.0}),
    ("latent_attention", {"query_rank": 6, "rank": 5, "key_width": 3, "value_width": 9, "bias": True, "rotary": False}),
    ("latent_attention", {"shared_width": 4, "output_gate": True, "rope_amplitude": 1.5, "scale": 0.3}),
    ("attention", {"query_group": 2, "qk_norm": True}),
    ("sliding_attention", {"query_group": 2, "window": 70}),
    ("based", {"window": 0, "conv_width": 0}),
    ("based", {"window": 9}),
    ("delta_product", {"steps": 3, "allow_negative_eigenvalues": False, "conv_width": 0}),
    ("dydila", {"projections": 2, "factors": 2, "conv_width": 0}),
    ("mala", {"conv_width": 0, "expand_value": 0.5}),
    ("mala", {"rope": True, "lepe": 5}),
    ("mlstm", {"expand_key": 1.0, "gate_cap": 4.0, "conv_width": 0}),
    ("nalaformer", {"power": 2.0, "conv_width": 0, "norm_over": "head"}),
    ("nalaformer", {"rope": True, "lepe": 5, "conv_width": 0}),
    ("trans_normer", {"diag_share": 0.0, "feature_map": "plain_elu"}),
    ("trans_normer", {"diag_share": 0.0, "norm_over": "head", "learned_angles": False}),
    ("trans_normer", {"block": 9}),
    ("ttt_linear", {"mini_batch": 5, "conv_width": 0}),
]
CASES = [pytest.param(name, TINY.get(name, {}), id=name) for name in MIXERS.names] + [
    pytest.param(name, fields, id=f"{name}-{'-'.join(map(str, fields.values()))}", marks=pytest.mark.all)
    for name, fields in VARIANTS
]
every_mixer = pytest.mark.parametrize(("name", "fields"), CASES)


def in_all(*values):
    return [pytest.param(value, marks=pytest.mark.all) for value in values]


# The algebra in float64, through norms and gates; the operators alone are held to 1e-11.
EXACT = 1e-9


def build(name, fields, *, dtype=torch.float64, index=1):
    torch.manual_seed(5)
    cls = MIXERS.get(name)
    return cls(cls.Config(**fields), LayerShape(WIDTH, HEADS, index, 4)).to(dtype)


def inputs(batch, tokens, dtype=torch.float64):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def differentiable(state):
    return {key: value.requires_grad_(value.is_floating_point() or value.is_complex()) for key, value in state.items()}


def run(mixer, x, state=None, **sequence):
    """Output, state and the gradient of everything, by name."""
    x = x.detach().clone().requires_grad_()
    past = differentiable({key: value.detach().clone() for key, value in (state or {}).items()})
    out, after = mixer(x, past or None, sequence=SequenceContext(**sequence))
    results = {"out": out, **{f"state {key}": value for key, value in after.items()}}
    leaves = {"x": x, **{f"past {key}": value for key, value in past.items() if value.requires_grad}}
    leaves |= dict(mixer.named_parameters())
    loss = sum((_real(value) * weights(_real(value))).sum() for value in results.values() if value.requires_grad)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"grad {key}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {key: value.detach() for key, value in results.items()}


def _real(x):
    return torch.view_as_real(x) if x.is_complex() else x


def weights(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(x)


def assert_close(came, expected, tolerance=EXACT):
    assert came.keys() == expected.keys()
    errors = {key: relative_error(came[key], expected[key]) for key in expected}
    beyond = {key: f"{error:.1e}" for key, error in errors.items() if not error <= tolerance}
    assert not beyond, beyond


def in_pieces(mixer, x, lengths, state=None):
    out = []
    for piece in x.split(lengths, 1):
        y, state = mixer(piece, state)
        out.append(y)
    return {"out": torch.cat(out, 1), **state}


@every_mixer
@pytest.mark.parametrize("tokens", [17, pytest.param(63, marks=pytest.mark.full), *in_all(1, 130)])
def test_chunked_equals_reference(name, fields, tokens):
    mixer = build(name, fields)
    _, state = mixer(inputs(2, 20))
    x = inputs(2, tokens)
    for past in (None, state):
        assert_close(run(mixer, x, past, backend="chunked"), run(mixer, x, past, backend="reference"))


@pytest.mark.all
@every_mixer
def test_what_runs_by_default_equals_reference_in_float32(name, fields):
    exact = run(build(name, fields), inputs(2, 130), backend="reference")
    # Ten times the operators' own 2e-5: norms of small outputs and long sums for weights' gradients lie between.
    assert_close(run(build(name, fields, dtype=torch.float32), inputs(2, 130, torch.float32)), exact, 2e-4)


@every_mixer
@torch.no_grad()
def test_any_split_in_time_equals_the_whole(name, fields):
    mixer, x = build(name, fields), inputs(2, 130)
    whole = in_pieces(mixer, x, [130])
    assert_close(in_pieces(mixer, x, [1, 16, 46, 67]), whole)
    assert_close(in_pieces(mixer, x, [128, 2]), whole)


@every_mixer
@torch.no_grad()
def test_step_after_step_equals_forward(name, fields):
    mixer, x = build(name, fields), inputs(2, 40)
    for prefix in (0, 23):
        outs, state = [x[:, :0]], None
        if prefix:
            out, state = mixer(x[:, :prefix])
            outs.append(out)
        for token in range(prefix, 40):
            out, state = mixer.step(x[:, token], state)
            outs.append(out[:, None])
        assert_close({"out": torch.cat(outs, 1), **state}, in_pieces(mixer, x, [40]))


@every_mixer
@torch.no_grad()
@pytest.mark.parametrize("cut", [40, *in_all(1, 100)])
def test_the_future_never_changes_the_past(name, fields, cut):
    mixer, x = build(name, fields, dtype=torch.float32), inputs(1, 130, torch.float32)
    before, _ = mixer(x)
    x[:, cut:] *= -30
    after, _ = mixer(x)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


@every_mixer
def test_packed_documents_equal_separate_ones(name, fields):
    mixer, lengths = build(name, fields), [5, 40, 1, 84]

    def out_and_gradient(*parts, **sequence):
        parts = [part.detach().clone().requires_grad_() for part in parts]
        out = torch.cat([mixer(part, sequence=SequenceContext(**sequence))[0] for part in parts], 1)
        wanted = [*parts, *mixer.parameters()]
        gradients = torch.autograd.grad((out * weights(out)).sum(), wanted)
        names = [name for name, _ in mixer.named_parameters()]
        return {"out": out, "x": torch.cat(gradients[: len(parts)], 1)} | dict(
            zip(names, gradients[len(parts) :], strict=True)
        )

    pieces = inputs(1, sum(lengths)).split(lengths, 1)
    packed = out_and_gradient(torch.cat(pieces, 1), cu_seqlens=boundaries(lengths))
    assert_close(packed, out_and_gradient(*pieces))


def out_and_gradient(mixer, x, sequence):
    """The output and the gradient of x, `[2,T,D]`."""
    x = x.detach().requires_grad_()
    out, _ = mixer(x, sequence=sequence)
    (out * weights(x)[:, : out.shape[1]]).sum().backward()
    return torch.cat([out.detach(), x.grad])


# Documents of a row, which of them have other numbers, and what these are times the usual: of 1e30 every state
# overflows, and then no product with it may be what keeps others apart.
DOCUMENTS, CHANGED, FACTORS = [38, 40, 1, 45], (0, 2), (100.0, 1e30)


def changed_rows():
    """The row as it is, and with its documents changed; which tokens are not."""
    x, ends = inputs(1, sum(DOCUMENTS), torch.float32), [0, *boundaries(DOCUMENTS).tolist()[1:]]
    kept = torch.ones(sum(DOCUMENTS), dtype=torch.bool)
    for n in CHANGED:
        kept[ends[n] : ends[n + 1]] = False
    return [x, *(torch.where(kept[:, None], x, x * factor) for factor in FACTORS)], kept


@every_mixer
def test_a_document_knows_nothing_of_others_whatever_their_numbers(name, fields):
    mixer, (rows, kept) = build(name, fields, dtype=torch.float32), changed_rows()
    same, *others = (out_and_gradient(mixer, x, SequenceContext(boundaries(DOCUMENTS))) for x in rows)
    for found in others:
        assert torch.equal(found[:, kept], same[:, kept])
        assert not torch.equal(found, same)


@pytest.mark.all
def test_nor_do_documents_of_a_sharded_row():
    rows, kept = changed_rows()
    offsets, mixers = (0, 30, 63, 101, 124), {f"{case.id}": build(*case.values, dtype=torch.float32) for case in CASES}

    def on_rank(rank):
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=offsets, cu_seqlens=boundaries(DOCUMENTS))
        own = slice(offsets[rank], offsets[rank + 1])
        found = {key: [out_and_gradient(mixer, x[:, own], sequence) for x in rows] for key, mixer in mixers.items()}
        flush_scans(dist.group.WORLD)
        return found

    parts = run_ranks(4, on_rank)
    for key in mixers:
        same, *others = (torch.cat(each, 1) for each in zip(*(part[key] for part in parts), strict=True))
        assert same.isfinite().all(), key
        for found in others:
            assert torch.equal(found[:, kept], same[:, kept]), key


@every_mixer
def test_gates_at_a_hundred_times_their_size_stay_finite(name, fields):
    mixer = build(name, fields, dtype=torch.float32)
    with torch.no_grad():
        for module in mixer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 100
    for key, found in run(mixer, inputs(2, 40, torch.float32)).items():
        assert found.isfinite().all(), key


@pytest.mark.all
@every_mixer
@torch.no_grad()
def test_packed_documents_continue_from_their_own_states(name, fields):
    mixer, first, second = build(name, fields), [3, 12, 1, 30], [17, 0, 66, 4]
    x, y = inputs(1, sum(first)), inputs(1, sum(second)) * 0.7
    _, state = mixer(x, sequence=SequenceContext(boundaries(first)))
    packed, _ = mixer(y, state, sequence=SequenceContext(boundaries(second)))
    separate = []
    for start, rest in zip(x.split(first, 1), y.split(second, 1), strict=True):
        separate.append(mixer(rest, mixer(start)[1])[0] if rest.shape[1] else rest)
    assert relative_error(packed, torch.cat(separate, 1)) <= EXACT


@pytest.mark.all
@every_mixer
def test_bfloat16_autocast_stays_finite_and_near(name, fields):
    mixer, x = build(name, fields, dtype=torch.float32), inputs(2, 130, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(mixer, x)
    assert [key for key, value in rounded.items() if not value.isfinite().all()] == []
    exact = run(mixer, x)
    for key, parameter in mixer.named_parameters():
        assert rounded[f"grad {key}"].dtype == parameter.dtype == torch.float32
    # Eight bits through a few layers of products, sums over 130 tokens in float32.
    assert relative_error(rounded["out"], exact["out"]) < 0.03
    assert relative_error(rounded["grad x"], exact["grad x"]) < 0.1


@every_mixer
def test_all_parameters_learn(name, fields):
    mixer = build(name, fields)
    results = run(mixer, inputs(2, 30))
    still = [key for key, _ in mixer.named_parameters() if not results[f"grad {key}"].any()]
    assert still == []


@every_mixer
@torch.no_grad()
def test_states_have_the_shapes_and_bytes_they_say(name, fields):
    mixer, state = build(name, fields, dtype=torch.float32), None
    for tokens in (1, 7, 60):
        _, state = mixer(inputs(3, tokens, torch.float32), state)
        seen = {1: 1, 7: 8, 60: 68}[tokens]
        assert {key: tuple(value.shape) for key, value in state.items()} == mixer.state_shapes(3, seen)
        assert sum(value.nbytes for value in state.values()) == 3 * mixer.state_bytes(seen)
    assert mixer.constant_state == (mixer.state_bytes(1) == mixer.state_bytes(1000))


@every_mixer
@torch.no_grad()
@pytest.mark.parametrize("index", [0, 3])
def test_flops_are_those_of_the_products_and_the_operators(name, fields, index):
    """Found without numbers and once for layers alike, they are what this very layer computes."""
    for tokens in (0, 5, 100):
        mixer, sequence = build(name, fields, index=index), CountingContext()
        with FlopCounterMode(display=False) as counter:
            mixer(inputs(1, tokens), sequence=sequence)
        assert len(sequence.flops) > 0 or not tokens
        assert mixer.flops(tokens) == counter.get_total_flops() + sum(sequence.flops)


@pytest.mark.parametrize("name", MIXERS.names)
def test_its_defaults_build_on_meta(name):
    cls = MIXERS.get(name)
    with torch.device("meta"):
        mixer = cls(cls.Config(), LayerShape(768, 12, 0, 12))
    assert {parameter.device.type for parameter in mixer.parameters()} == {"meta"}
