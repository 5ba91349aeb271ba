"""Spark: which channels an MLP keeps, the kernel that skips the others, and decoding that reads few keys."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from seqtrain.errors import ConfigError
from seqtrain.kernels import softmax_attention, sparse_mlp
from seqtrain.kernels.native import build
from seqtrain.models import generate
from seqtrain.models.feed_forward import MLP
from seqtrain.models.spark import SparkConfig, SparkMLP, threshold
from seqtrain.testing import relative_error
from tests.models import tiny

WIDTH, HIDDEN = 24, 400


def spark(share=0.08, channels=9, **fields):
    torch.manual_seed(2)
    made = SparkMLP(WIDTH, HIDDEN, SparkConfig(share, channels, **fields), activation="gelu")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.double()


def x(rows=5):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_the_formula():
    made, given = spark(), x()
    for row, came in zip(given, made(given), strict=True):
        scores = made.predict.weight @ row[:9]
        quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.92, dtype=torch.float64))
        gate = F.gelu((scores - scores.mean() - scores.std() * quantile).clamp(min=0))
        torch.testing.assert_close(came, (gate * (made.value @ row[9:])) @ made.down)
    assert sum(each.numel() for each in spark().parameters()) == 2 * WIDTH * HIDDEN


@pytest.mark.parametrize("share", [0.08, 0.25])
def test_as_many_scores_lie_above_the_threshold_as_asked(share):
    scores = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    above = (scores > threshold(scores, SparkConfig(share), 2000)).double().mean()
    assert above.item() == pytest.approx(share, abs=0.002)
    # Of numbers that aren't normal the exact one keeps as many, too.
    exact = scores.exp() > threshold(scores.exp(), SparkConfig(share, selection="exact"), 2000)
    assert exact.sum(-1).tolist() == 200 * [round(share * 2000)]


@pytest.mark.skipif(build.unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(37, 5, 3), (1100, 64, 70)])
@torch.no_grad()
def test_the_kernel_reads_what_is_kept_alone(sizes, dtype):
    hidden, inner, width = sizes
    generator = torch.Generator().manual_seed(3)
    gate, given, value, down = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((3, hidden), (3, inner), (hidden, inner), (hidden, width))
    )
    gate[gate < 1] = 0
    expected = sparse_mlp(*(each.double() for each in (gate, given, value, down)), backend="reference")
    # A channel that no row keeps is not read.
    idle = (gate == 0).all(0)
    assert idle.any()
    value[idle], down[idle] = torch.nan, torch.nan
    came = sparse_mlp(gate, given, value, down, backend="native")
    assert came.dtype == dtype
    assert relative_error(came.double(), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def test_shapes_are_known_without_numbers():
    with FakeTensorMode():
        made = SparkMLP(WIDTH, HIDDEN, SparkConfig(0.08, 9))
        assert made(torch.empty(1, WIDTH)).shape == (1, WIDTH)


@torch.no_grad()
def test_threads_change_nothing(monkeypatch):
    made, given, results = spark().float(), x(2).float(), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(made(given))
    assert torch.equal(*results)


def test_a_model_has_it_with_as_many_weights():
    fields = {"layers": ("gla", "attention"), "width": 48, "initializer_range": 0.3}
    sparse, dense = tiny.build(**fields, mlps=("spark",)), tiny.build(**fields)
    assert abs(sparse.parameter_count() / dense.parameter_count() - 1) < 0.01
    assert {type(block.mlp) for block in sparse.blocks} == {SparkMLP}
    assert {type(block.mlp) for block in dense.blocks} == {MLP}
    tokens, labels = tiny.batch()
    sparse(tokens, labels).backward()
    assert [name for name, weight in sparse.named_parameters() if not weight.grad.any()] == []
    new = generate(sparse, tokens[:, :9], max_new_tokens=8, temperature=0)
    with torch.no_grad():
        logits, _ = sparse(torch.cat([tokens[:, :9], new], 1), all_logits=True)
    assert torch.equal(new, logits[:, 8:-1].argmax(-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spark": SparkConfig(channels=24)}, r"model\.spark\.channels=24: must be below model\.width=24"),
        ({"spike_rate": 3.0}, r"model\.mlps: spark keeps channels by scores"),
    ],
)
def test_what_can_t_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        tiny.build(("gla",), mlps=("spark",), **fields)


@torch.no_grad()
def test_a_model_s_steps_read_few_keys():
    tokens = tiny.batch(30)[0]
    few, all_ = (
        tiny.build(
            ("attention",), settings={"attention": {"kept_keys": kept, "predict_width": 4}}, initializer_range=0.5
        )
        for kept in (4, 0)
    )
    (_, state), (_, other) = few(tokens), all_(tokens)
    stepped, _ = few.step(tokens[:, 0], state)
    whole, _ = all_.step(tokens[:, 0], other)
    again, _ = few(torch.cat([tokens, tokens[:, :1]], 1), all_logits=True)
    assert not torch.allclose(stepped, whole, atol=1e-3)
    torch.testing.assert_close(whole, again[:, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoding_reads_the_keys_that_are_kept():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    _, past = softmax_attention(q[:, :39], k[:, :39], v[:, :39])
    last = [part[:, 39:] for part in (q, k, v)]
    whole, after = softmax_attention(*last, initial_state=past)
    all_kept, same = softmax_attention(*last, initial_state=past, kept_keys=40, predict_width=3)
    torch.testing.assert_close(all_kept, whole)
    assert all(torch.equal(after[name], same[name]) for name in after)
    few, _ = softmax_attention(*last, initial_state=past, kept_keys=6, predict_width=3)
    for row in range(2):
        for head in range(4):
            query, keys, values = q[row, 39, head], k[row, :, head // 2], v[row, :, head // 2]
            kept = (keys[:, :3] @ query[:3]).topk(6).indices
            weights = (keys[kept] @ query / 8**0.5).softmax(0)
            torch.testing.assert_close(few[row, 0, head], weights @ values[kept])
    # Rows of no token count for nothing, however many are kept.
    shorter = {
        name: F.pad(part[:, 30:], (0, 0, 0, 0, 5, 0), value=9.0) for name, part in past.items() if name != "length"
    }
    padded, _ = softmax_attention(
        *last, initial_state=shorter | {"length": torch.tensor([9, 9])}, kept_keys=12, predict_width=3
    )
    plain, _ = softmax_attention(*(part[:, 30:] for part in (q, k, v)))
    torch.testing.assert_close(padded, plain[:, -1:])
