"""Attention with a memory for its far past: held to the quadratic form, to softmax attention, and to its own pieces."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.errors import ConfigError
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.mixers.linearized_attention import recurrent_mixers
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import relative_error

pytestmark = pytest.mark.usefixtures("no_gradients")

WIDTH, HEADS = 24, 4
WINDOW, SINKS = 5, 2
EXACT = 1e-12
PROJECTIONS = {"query_group": 2, "qk_norm": True, "qkv_bias": True, "head_width": 10}
MEMORIES = recurrent_mixers()
NORMALIZED = [name for name in MEMORIES if MIXERS.get(name).recurrence.has_normalizer]
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def build(name="linearized_attention", **fields):
    torch.manual_seed(3)
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(**{**PROJECTIONS, **fields}), LayerShape(WIDTH, HEADS)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def hybrid(memory, **fields):
    return build(memory=memory, **{"window": WINDOW, "sinks": SINKS, "slots": 3, **fields})


def inputs(tokens, batch=2, seed=7):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(came, expected, limit=EXACT):
    assert came.keys() == expected.keys()
    errors = {key: relative_error(came[key], expected[key]) for key in expected}
    assert [key for key, error in errors.items() if not error <= limit] == [], errors


def decay_between(written, tokens):
    """`[B,G,T,T,F]`: how much of what s wrote is left when t has been written."""
    log_decay = written.get("log_decay")
    if log_decay is None:
        return 1.0
    log_decay = (log_decay if log_decay.dim() == 4 else log_decay[..., None]).double()
    total = log_decay.cumsum(1).transpose(1, 2)  # B G T F
    return (total[:, :, :, None] - total[:, :, None]).exp()


@pytest.mark.parametrize("memory", NORMALIZED)
@pytest.mark.parametrize("group", [1, 2])
def test_window_sinks_and_memory_equal_the_quadratic_form(memory, group):
    """Every past token is counted once, by the window, as a sink, or by the memory, in the order it left."""
    mixer, tokens = hybrid(memory, query_group=group), 30
    x = inputs(tokens)
    q, k, v = mixer.project(x)
    place = torch.arange(tokens)[None]
    rotated_q, rotated_k = mixer.rotated(q, place), mixer.rotated(k, place)
    each = lambda heads: heads.repeat_interleave(group, 2).transpose(1, 2)  # noqa: E731  B H T K
    scores = torch.einsum("bhtk,bhsk->bhts", rotated_q.transpose(1, 2), each(rotated_k)) * mixer.key**-0.5
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = (s <= t) & ((t - s < WINDOW) | (s < SINKS))
    written = mixer.memory.write(x, k, v)
    # Sinks never write; a token's decay acts when it is written, WINDOW tokens late.
    written = {name: part * (s >= SINKS).view(1, -1, *[1] * (part.dim() - 2)) for name, part in written.items()}
    left = decay_between(written, tokens)
    features = each(written["k"])[:, :, None].expand(-1, -1, tokens, -1, -1)  # B H T S F
    left = left.repeat_interleave(group, 1) if isinstance(left, torch.Tensor) else left
    # What t reads was complete WINDOW tokens ago, with the decays of then.
    held = (features * left)[:, :, : tokens - WINDOW]
    queries = (q[..., None, :] @ mixer.memory.query_map)[..., 0, :]
    queries = mixer.memory.features(queries).transpose(1, 2)[:, :, WINDOW:]
    remembered = F.pad(torch.einsum("bhtf,bhtsf->bhts", queries, held), (0, 0, WINDOW, 0))
    slope = mixer.opening_slope.view(-1, q.shape[-1])
    opened = (mixer.opening + (q * slope).sum(-1)).exp().transpose(1, 2)[..., None]  # B H T 1
    remembered = remembered.masked_fill((s > t - WINDOW) | (s < SINKS), 0.0) * opened
    weights = scores.exp().masked_fill(~near, 0.0) + remembered
    out = (weights / weights.sum(-1, keepdim=True)) @ each(v)
    expected = mixer.out(out.transpose(1, 2).flatten(2))
    assert relative_error(mixer(x)[0], expected) < EXACT


def softmax_layer(mixer, **fields):
    """`attention`, `sliding_attention` or `streaming_attention` with the projections of `mixer`."""
    windowed = "streaming_attention" if "sinks" in fields else "sliding_attention"
    softmax = build(windowed if "window" in fields else "attention", **fields)
    own = softmax.state_dict()
    softmax.load_state_dict({name: value for name, value in mixer.state_dict().items() if name in own})
    return softmax


@every_memory
def test_within_the_window_it_is_softmax_attention(memory):
    """With norms, biases and free head widths; also where T equals the number of heads, or one."""
    for tokens in (1, HEADS, 40):
        mixer = hybrid(memory, window=40)
        x = inputs(tokens)
        assert relative_error(mixer(x)[0], softmax_layer(mixer)(x)[0]) < EXACT


@every_memory
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_a_memory_that_counts_nothing_leaves_window_and_sinks(memory, sinks):
    """The window has as many keys as that of `sliding_attention`."""
    mixer, x = hybrid(memory, sinks=sinks), inputs(30)
    mixer.opening.fill_(-torch.inf)
    fields = {"window": WINDOW, "sinks": sinks} if sinks else {"window": WINDOW}
    alone = softmax_layer(mixer, **fields)(x)[0]
    assert relative_error(mixer(x)[0], alone) < EXACT
    mixer.opening.fill_(0.0)
    assert relative_error(mixer(x)[0], alone) > 1e-3
    mixer.without = "memory"
    assert relative_error(mixer(x)[0], alone) < EXACT


@every_memory
def test_ablating_the_window_leaves_the_memory_of_older_tokens(memory):
    mixer, x = hybrid(memory), inputs(30)
    mixer.without = "window"
    out = mixer(x)[0]
    x[:, -1] += 1.0
    moved = mixer(x)[0]
    assert not out[:, : WINDOW + SINKS].any()
    assert out[:, WINDOW + SINKS :].any()
    assert torch.equal(out[:, :-1], moved[:, :-1])


@every_memory
@pytest.mark.parametrize("window", [0, WINDOW])
def test_key_heads_are_shared_by_neighboring_query_heads(memory, window):
    """Repeated by heads, not by rows; and the state is kept once a key head."""
    shared = hybrid(memory, window=window)
    x, (_, state) = inputs(20), shared(inputs(20))
    q, k, v = (part.detach() for part in shared.project(x))
    written = shared.memory.write(x, k, v)
    value, normalizer, _ = shared.memory.read(q, written, {}, SequenceContext())
    for head in range(HEADS):
        group = slice(head // 2, head // 2 + 1)
        one = {name: part[:, :, group] for name, part in written.items()}
        mine, my_normalizer, _ = shared.memory.read(q, one, {}, SequenceContext())
        assert relative_error(value[:, :, head], mine[:, :, head]) < EXACT
        if normalizer is not None:
            assert relative_error(normalizer[:, :, head], my_normalizer[:, :, head]) < EXACT
    assert {key: tuple(value.shape) for key, value in state.items()} == shared.state_shapes(2)
    recurrent = {"slot_keys", "slot_values"} if memory == "gsa" else {"memory"}
    assert {state[name].shape[1] for name in recurrent} == {HEADS // 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "kda", "combine": "denominator"}, "combine=denominator: memory=kda has no normalizer"),
        ({"head_width": 7}, "linearized_attention.head_width=7: a head has 7 channels"),
        ({"rope_stretch": (1.0, 2.0)}, r"rope_stretch=\[2 numbers\]: a head of 10 channels has 5"),
        ({"query_group": 3}, "query_group=3: must divide model.heads=4"),
        ({"memory": "kda", "tied_gate": True}, "tied_gate=true: memory=kda has no tied gate"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields)


@pytest.mark.parametrize("name", ["liger_gla", "liger_hgrn2", "liger_gsa"])
def test_liger_is_what_was_published(name):
    """arXiv 2503.01496, eq. 9 to 12, token by token, with the gates, features and scale of the released code."""
    mixer, tokens = build(name, window=WINDOW), 20
    x = inputs(tokens, batch=1)
    q, k, v = mixer.project(x)
    near = softmax_layer(mixer, window=WINDOW)
    near.out = torch.nn.Identity()
    windowed = near(x)[0][0].unflatten(1, (HEADS, -1))
    outs = []
    for head in range(HEADS):
        state = torch.zeros(mixer.key, mixer.key, dtype=x.dtype)
        slots = torch.zeros(mixer.key, mixer.key, dtype=x.dtype)
        for t in range(tokens):
            query, key, value = q[0, t, head], k[0, t, head // 2], v[0, t, head // 2]
            keep = key.sigmoid() if name == "liger_hgrn2" else key.sigmoid() ** (1 / 16)
            write = {"liger_gla": key.softmax(0), "liger_hgrn2": 1 - keep, "liger_gsa": 1 - keep}[name]
            state = keep[:, None] * state + write[:, None] * value
            slots = keep[:, None] * slots + write[:, None] * key
            read = (slots @ query).softmax(0) if name == "liger_gsa" else query.softmax(0)
            outs.append(0.5 * windowed[t, head] + 0.5 * read @ state)
    expected = mixer.out(torch.stack(outs).unflatten(0, (HEADS, tokens)).transpose(0, 1).flatten(1))
    assert relative_error(mixer(x)[0][0], expected) < EXACT
    assert sum(p.numel() for p in mixer.parameters()) == sum(p.numel() for p in softmax_layer(mixer).parameters())


@pytest.mark.all
@every_memory
@pytest.mark.parametrize("window", [0, WINDOW])
def test_with_norms_each_part_counts_by_its_weight_alone(memory, window):
    """However large a part is, its heads enter the sum with a root mean square of 1 times the weight."""
    mixer, x = hybrid(memory, window=window, combine="norms", norm_eps=1e-12), inputs(30)
    mixer.out = torch.nn.Identity()
    parts = {}
    for part, kept in (("memory", "window_norm"), ("window", "memory_norm")):
        mixer.without = part
        parts[part] = mixer(x)[0].unflatten(2, (HEADS, -1))[:, 10:]
        if window or part == "window":
            weight = getattr(mixer, kept).weight
            sizes = (parts[part] / weight).square().mean(-1).sqrt()
            assert torch.allclose(sizes, torch.ones_like(sizes), atol=1e-5)
    mixer.without = ""
    whole = mixer(x)[0].unflatten(2, (HEADS, -1))[:, 10:]
    assert relative_error(whole, parts["memory"] + parts["window"] if window else parts["window"]) < EXACT


def test_a_tied_gate_forgets_what_its_key_writes():
    mixer, x = hybrid("gla", tied_gate=True), inputs(30)
    _, k, v = mixer.project(x)
    written = mixer.memory.write(x, k, v)
    assert torch.allclose(written["log_decay"].exp(), 1 - written["k"], atol=1e-6)
    assert {name for name, _ in mixer.memory.named_parameters()} == {"query_map", "key_map"}
    # A key whose softmax has one channel far ahead must leave a logarithm.
    assert torch.isfinite(mixer.memory.write(x, 1000 * k, v)["log_decay"]).all()


def test_the_smaller_spikingbrain_s_layer():
    """GatedLinearAttention in hf_7B_model/gla_attention.py of BICLab/SpikingBrain-7B at ef99987, token by token."""
    mixer, x = build(memory="gla", window=0, combine="norms", feature_map="relu", qk_norm=False), inputs(30)
    # Heads are normalised: what they were divided by before counts for nothing but beside eps.
    mixer.memory_norm.eps = 0.0
    assert {name for name, _ in mixer.memory.named_parameters()} == {
        "forget.0.weight",
        "forget.1.weight",
        "forget.1.bias",
    }
    q, k, v = mixer.project(x)
    keep = (F.logsigmoid(mixer.memory.forget(x)) / 16).exp().unflatten(2, (2, -1))
    q, k, v, keep = q.relu(), *(part.repeat_interleave(2, 2) for part in (k.relu(), v, keep))
    state, out = torch.zeros(2, HEADS, 10, 10, dtype=torch.float64), []
    for t in range(30):
        state = keep[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, None] @ state)[:, :, 0] / 10**0.5)
    read = torch.stack(out, 1)
    normed = read / read.square().mean(-1, keepdim=True).sqrt() * mixer.memory_norm.weight
    assert relative_error(mixer(x)[0], mixer.out(normed.flatten(2))) < EXACT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "kda", "feature_map": "relu"}, r"feature_map=relu: memory=kda makes no such features"),
        ({"memory": "gla", "feature_map": "relu", "tied_gate": True}, r"feature_map=relu: tied_gate=true needs keys"),
    ],
)
def test_feature_maps_that_can_t_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields)
