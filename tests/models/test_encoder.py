"""Encoders: what tokens see of their document, ranks that agree, tasks that are learned, what can't be."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqtrain.encoders import ENCODERS
from seqtrain.encoders.linear_infsa import centrality
from seqtrain.errors import ConfigError
from seqtrain.kernels import softmax_attention
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel import SequenceContext, ShardedSequence, flush_scans
from seqtrain.parallel.both_ways import BothWays
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import boundaries, relative_error

WIDTH, HEADS = 16, 2
FIELDS = {
    "afno": {"blocks": 4, "threshold": 1e-4},
    "attention": {"query_group": 2},
    "delta_product": {"steps": 2},
    "mamba2": {"state": 4},
    "mamba3": {"state": 4},
    "s5": {"bidirectional": True},
    "s4d": {"bidirectional": True, "state": 6},
    "sliding_attention": {"window": 9},
    "tensor_attention": {"key": 3},
}
QUICK = ("afno", "attention", "gated_delta_net", "linear_infsa", "mala", "mamba3", "s5")
NAMES = [*QUICK, *(name for name in (*MIXERS.names, *ENCODERS.names) if name not in (*QUICK, "tcnca"))]
# Those that know where tokens lie, or (AFNO) the phases of their modes.
PLACED = {"attention", "intra_hybrid", "latent_attention", "linearized_attention", "retnet", "sliding_attention"}
PLACED |= {"afno", "streaming_attention", "parallel", "liger_gla", "liger_gsa", "liger_hgrn2", "trans_normer"}
# The first token that sees the fifteenth, where not all do: by a convolution, a window, gates that underflow.
FIRST = {"gated_convolution": 13, "sliding_attention": 7, "min_gru": 12}
every_layer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.all) for name in NAMES]
)


def build(name, **fields):
    torch.manual_seed(5)
    cls = (ENCODERS if name in ENCODERS.names else MIXERS).get(name)
    fields = FIELDS.get(name, {}) | fields
    mixer = cls(cls.Config(**fields), LayerShape(WIDTH, HEADS, 3, 4, encoder=True)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.dim() > 2:
                parameter.mul_(10)
    return mixer


def x(tokens, batch=1):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def whole(mixer, given, *lengths):
    return mixer(given, sequence=BothWays.of(SequenceContext(boundaries(lengths) if lengths else None)))[0]


@every_layer
@torch.no_grad()
def test_what_follows_changes_what_came_before(name):
    mixer, given = build(name), x(19, batch=2)
    changed = given.clone()
    changed[:, 15:] += 1
    before, after = whole(mixer, given), whole(mixer, changed)
    near = slice(FIRST.get(name, 0), 15)
    assert ((before - after)[:, near].abs().amax(-1) > 0).all()
    # As the definition says: in reverse order all is reversed, but for those that know places.
    if name not in PLACED:
        assert relative_error(whole(mixer, given.flip(1)).flip(1), before) < 1e-10 or name in ("s4d", "s5")
    packed, lengths = x(40), (19, 1, 0, 20)
    separate = torch.cat([whole(mixer, part) for part in packed.split(lengths, 1) if part.shape[1]], 1)
    assert relative_error(whole(mixer, packed, *lengths), separate) < 1e-10


@pytest.mark.parametrize("name", ["linear_attention", "mala", "nalaformer", "dydila", "linear_infsa"])
@torch.no_grad()
def test_what_only_sums_follows_any_permutation(name):
    mixer, given = build(name, **({} if name == "linear_infsa" else {"conv_width": 0})), x(19)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    assert relative_error(whole(mixer, given[:, order]), whole(mixer, given)[:, order]) < 1e-10


@torch.no_grad()
def test_attention_and_mala_are_those_without_a_mask():
    q, k, v = torch.randn(3, 2, 9, HEADS, 4, dtype=torch.float64)
    out, _ = BothWays.of(SequenceContext()).run(softmax_attention, q, k, v, scale=0.3)
    weights = (0.3 * torch.einsum("bthk,bshk->bhts", q, k)).softmax(-1)
    assert relative_error(out, torch.einsum("bhts,bshv->bthv", weights, v)) < 1e-12
    mixer, given = build("mala", conv_width=0), x(9)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in mixer.qkv.linear(given).chunk(3, 2))
    score = (F.elu(q) + 1) @ (F.elu(k) + 1).mT / math.sqrt(8)
    mean = score.mean(-1, keepdim=True)
    read = ((score * (1 + 1 / mean) - mean) / 9 @ v).transpose(1, 2).flatten(2)
    assert relative_error(whole(mixer, given), mixer.out(read * mixer.gate(given))) < 1e-12


@torch.no_grad()
def test_the_fourier_layer_is_a_filter_of_each_mode():
    mixer, given = build("afno"), x(12)
    modes = torch.fft.rfft(given[0].T, norm="ortho").T.reshape(7, 4, 4)
    rows = torch.zeros(7, 16, dtype=torch.complex128)
    for mode in range(7):
        for block in range(4):
            up, down = (torch.view_as_complex(weight[block]) for weight in (mixer.up, mixer.down))
            hidden = modes[mode, block] @ up
            passed = torch.complex(hidden.real.relu(), hidden.imag.relu()) @ down
            kept = torch.complex(*(F.softshrink(part, 1e-4) for part in (passed.real, passed.imag)))
            rows[mode, 4 * block : 4 * block + 4] = kept
    expected = given[0] + torch.fft.irfft(rows.T, n=12, norm="ortho").T
    assert relative_error(whole(mixer, given)[0], expected) < 1e-10
    assert not torch.allclose(expected, given[0], rtol=1e-3)


def test_centrality_is_the_principal_eigenvector_where_queries_agree():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 1, 1024, 1, 16, generator=generator, dtype=torch.float64) + 0.5).unbind()
    graph = F.relu(q[0, :, 0] @ k[0, :, 0].T)
    vector = torch.ones(1024, dtype=torch.float64)
    for _ in range(100):
        vector = F.normalize(vector @ graph, dim=0)
    assert F.cosine_similarity(centrality(q, k)[0, :, 0], vector, dim=0) > 0.98


OFFSETS, DOCUMENTS = (0, 17, 17, 40, 64), (20, 3, 0, 41)


def gradients(mixer, given, sequence):
    given = given.detach().clone().requires_grad_()
    out, _ = mixer(given, sequence=BothWays.of(sequence))
    out.square().sum().backward()
    weights = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    mixer.zero_grad()
    return out.detach(), given.grad, weights


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(NAMES[len(QUICK) :], marks=pytest.mark.all)], ids=["quick", "all"]
)
@pytest.mark.parametrize("lengths", [DOCUMENTS, ()], ids=["documents", "rows"])
def test_four_ranks_agree_with_one(names, lengths):
    ends, mixers = boundaries(lengths) if lengths else None, {name: build(name) for name in names}

    def on_rank(rank):
        sequence = ShardedSequence(group=dist.group.WORLD, offsets=OFFSETS, cu_seqlens=ends)
        own = slice(OFFSETS[rank], OFFSETS[rank + 1])
        found = {name: gradients(mixer, x(64)[:, own], sequence) for name, mixer in mixers.items()}
        flush_scans(dist.group.WORLD)
        return found

    parts = run_ranks(4, on_rank)
    for name, mixer in mixers.items():
        out, given, weights = gradients(mixer, x(64), SequenceContext(ends))
        assert relative_error(torch.cat([part[name][0] for part in parts], 1), out) < 1e-9, name
        assert relative_error(torch.cat([part[name][1] for part in parts], 1), given) < 1e-9, name
        for key, expected in weights.items():
            came = sum(part[name][2][key] for part in parts if part[name][2][key] is not None)
            assert relative_error(came, expected) < 1e-9, (name, key)


def encoder(*layers, **fields):
    torch.manual_seed(1)
    config = ModelConfig(kind="encoder", layers=layers, depth=len(layers), width=WIDTH, heads=HEADS, **fields)
    mixers = {
        name: (ENCODERS if name in ENCODERS.names else MIXERS).get(name).Config(**FIELDS.get(name, {}))
        for name in layers
    }
    return LanguageModel(config, mixers, 20)


def test_a_model_of_all_of_them_gives_every_parameter_a_gradient():
    model = encoder(*QUICK)
    tokens = torch.arange(30).view(2, 15) % 20
    loss = model(tokens, tokens)
    loss.backward()
    assert loss.isfinite()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    logits, _ = model(tokens, all_logits=True)
    other, _ = model(tokens.index_fill(1, torch.tensor(14), 3), all_logits=True)
    assert not torch.equal(logits[:, 0], other[:, 0])
    assert model.flops(15) > encoder("linear_infsa").flops(15) > 0


def test_both_directions_are_counted_twice_and_a_sum_once():
    for name, times in (("linear_attention", 1), ("gla", 2)):
        cls = MIXERS.get(name)
        one, both = (
            cls(cls.Config(), LayerShape(WIDTH, HEADS, 0, 1, encoder=encoder)).flops(32) for encoder in (False, True)
        )
        products = (
            2 * 32 * sum(p.numel() for p in cls(cls.Config(), LayerShape(WIDTH, HEADS)).parameters() if p.dim() == 2)
        )
        assert both - products == times * (one - products)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: encoder("tcnca"), ConfigError, r"^model\.kind=encoder: layer 0, tcnca, has groups of tokens"),
        (lambda: encoder("gla", groups=(4,)), ConfigError, r"^model\.kind=encoder: layer 0, gla, has groups of tokens"),
        (lambda: encoder("gla").step(torch.zeros(1, dtype=torch.int64), [{}]), ValueError, "nor steps"),
        (
            lambda: LanguageModel(ModelConfig(layers=("afno",), depth=1, width=16, heads=2), {}, 20),
            ConfigError,
            r"^model\.layers=afno: sees tokens to come, .* use model\.kind=encoder",
        ),
    ],
)
def test_what_can_not_be(call, error, said):
    with pytest.raises(error, match=said):
        call()
