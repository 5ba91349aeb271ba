"""Counts of a model that was never allocated, compared with the same model really built and run."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.shared import SharedConfig
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.planning import parts
from seqtrain.planning.counts import ModelCounter
from seqtrain.planning.parts import MicroBatch, PartTracer
from seqtrain.planning.trace import Tracer

VOCAB = 40
TOKENS = 96
# Products that PyTorch's counter leaves out.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda _, a, b, **others: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.baddbmm_: lambda _, a, b, **others: 2 * a[0] * a[1] * a[2] * b[2],
}


def config_of(*names, depth=None, **fields):
    return ModelConfig(layers=names, depth=depth or len(names), width=32, heads=2, **fields)


def count_model(config, mixers, vocab, *, tokens, rows=1, **options):
    return ModelCounter(config, mixers, vocab, **options).count(tokens, rows)


def mixers_of(*names):
    return {name: MIXERS.get(name).Config() for name in names}


class Saved:
    """A tensor that a backward pass needs; it lives as long as that pass may come."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_in_reality(run, module, x):
    """Bytes that `run(x)` keeps for the backward pass of its output (not parameters, x and indices), and those of its
    masks among them, of which some follow from places alone, others from what was computed.
    """
    # What was saved for other outputs, such as a state nobody takes, goes with them.
    saved = weakref.WeakSet()

    def pack(tensor):
        holder = Saved(tensor)
        saved.add(holder)
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = run(x)
    gc.collect()
    kept, masks = {}, {}
    for tensor in (*(holder.tensor for holder in saved), out):
        if tensor.dtype not in (torch.int32, torch.int64):
            storage = tensor.untyped_storage()
            (masks if tensor.dtype == torch.bool else kept)[storage.data_ptr()] = storage.nbytes()
    for own in (*module.parameters(), x):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(kept.values()), sum(masks.values())


# What layers compute is in their own contract; here are those that keep different things for the backward pass.
TIERS = dict.fromkeys(("attention", "tcnca", "s5", "tensor_attention", "ttt_linear"), pytest.mark.all)
TIERS |= {"gated_delta_net": ()}  # in the quick loop
EACH = [pytest.param(name, marks=TIERS.get(name, pytest.mark.full)) for name in MIXERS.names]


@pytest.mark.parametrize("name", EACH)
def test_every_mixer_is_counted_as_it_is(name):
    config, mixers = config_of(name), mixers_of(name)
    counts = count_model(config, mixers, VOCAB, tokens=TOKENS, rows=2)
    model = LanguageModel(config, mixers, VOCAB)
    block = model.blocks[0]
    _, mixer, mlp, loss = counts.parts
    assert [part.part for part in counts.parts] == ["embedding", "mixer", "mlp", "loss"]
    assert mixer.kind == name
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert mixer.parameters == block.mixer.parameter_count() + config.width
    assert mixer.forward_flops == 2 * block.mixer.flops(TOKENS)
    assert mixer.backward_flops == 2 * mixer.forward_flops
    assert counts.forward_flops == 2 * model.flops(TOKENS)
    assert counts.state_bytes == model.state_bytes(TOKENS)

    x = torch.randn(2, TOKENS, config.width, requires_grad=True)
    mixed, masks = saved_in_reality(lambda x: x + block.mixer(block.mixer_norm(x))[0], block, x)
    assert mixed <= mixer.saved_bytes <= mixed + masks
    assert (mlp.saved_bytes, 0) == saved_in_reality(lambda x: x + block.mlp(block.mlp_norm(x)), block, x)
    assert loss.gradient_bytes == 4 * config.width * (VOCAB + 1)


# Chunks and softmax in one layer, and pairs.
REST = ("gated_delta_net", "mamba2", "attention")


@pytest.mark.all
@pytest.mark.parametrize(
    "name", ["tcnca", "tensor_attention", *(pytest.param(name, marks=pytest.mark.full) for name in REST)]
)
def test_executed_flops_are_those_of_the_chunk_forms(name):
    config, mixers = config_of(name), mixers_of(name)
    counts = count_model(config, mixers, VOCAB, tokens=TOKENS)
    mixer = LanguageModel(config, mixers, VOCAB).blocks[0].mixer

    def executed(kernel):
        x = torch.randn(1, TOKENS, config.width, requires_grad=True)
        with sdpa_kernel(kernel), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            out = mixer(x, sequence=SequenceContext(backend="chunked"))[0]
            forward = counter.get_total_flops()
            out.sum().backward()
        return forward, counter.get_total_flops() - forward

    # PyTorch does not count its softmax kernel on the CPU; without it softmax is two products over all pairs, counted.
    forward, backward = executed(SDPBackend.FLASH_ATTENTION)
    softmax = executed(SDPBackend.MATH)[0] - forward
    assert (softmax > 0) == (name in ("attention", "tcnca"))
    # The kernel skips half of the pairs; backward it has five products: the scores again, and four of gradients.
    assert counts.parts[1].executed_forward - forward == softmax / 2
    assert counts.parts[1].executed_backward - backward == 2.5 * softmax / 2
    assert counts.executed_flops(checkpointing=True) > counts.executed_flops(checkpointing=False)


def traced_whole(config, mixers):
    """What the forward pass of 200 tokens did, and what both passes."""
    tracer = Tracer()
    with torch.device("meta"):
        whole = LanguageModel(config, mixers, VOCAB)
    tokens = torch.zeros(1, 200, dtype=torch.int64)
    with tracer.filled(whole) as model, tracer, tracer.record() as both:
        with tracer.record() as forward:
            loss = model(tokens, tokens)
        loss.backward()
    return forward, both


WHOLE = {(True, "groups"), (False, "tie_embeddings")}
SHARED = SharedConfig(layers=(0, 1), mixer="sliding_attention", adapter_rank=3)


@pytest.mark.parametrize(
    ("checkpointing", "fields"),
    [
        pytest.param(again, fields, marks=pytest.mark.all if (again, *fields) in WHOLE else pytest.mark.full)
        for again in (False, True)
        # What enters a layer with a shared block is not kept, but counted: of use where all else is computed again.
        for fields in ({}, {"tie_embeddings": False}, {"groups": (0, 24)}, *again * ({"shared": SHARED},))
    ],
)
def test_the_parts_make_the_whole(checkpointing, fields):
    names = ("gla", "sliding_attention", "s5")
    config = config_of(*names, depth=5, activation_checkpointing=checkpointing, **fields)
    mixers = mixers_of(*names)
    counts = count_model(config, mixers, VOCAB, tokens=200)
    forward, both = traced_whole(config, mixers)
    assert counts.saved_bytes(checkpointing=checkpointing) == pytest.approx(forward.kept, rel=1e-3)
    assert counts.peak_bytes(checkpointing=checkpointing) == pytest.approx(both.peak, rel=0.02)
    if checkpointing:
        assert counts.saved_bytes(checkpointing=True) < 0.4 * counts.saved_bytes(checkpointing=False)


@pytest.mark.all
@pytest.mark.parametrize(
    "recompute",
    [
        ("norm", "mlp", "projection"),
        *(pytest.param(each, marks=pytest.mark.full) for each in (("norm",), ("mlp",), ("projection",))),
    ],
    ids=",".join,
)
def test_the_parts_make_the_whole_where_some_are_recomputed(recompute):
    names = ("gla", "sliding_attention", "s5")
    config, mixers = config_of(*names, depth=5, recompute=recompute), mixers_of(*names)
    counts, kept = (
        count_model(each, mixers, VOCAB, tokens=200) for each in (config, dataclasses.replace(config, recompute=()))
    )
    forward, both = traced_whole(config, mixers)
    assert counts.saved_bytes(checkpointing=False) == pytest.approx(forward.kept, rel=1e-3)
    assert counts.peak_bytes(checkpointing=False) == pytest.approx(both.peak, rel=0.02)
    assert counts.saved_bytes(checkpointing=False) < kept.saved_bytes(checkpointing=False)
    assert [part.exchanges for part in counts.parts] == [part.exchanges for part in kept.parts]


@pytest.mark.all
# A window of 512: seven blocks, the first unlike the others, and 100 tokens.
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("sliding_attention", 3684), *(pytest.param(name, 1536, marks=pytest.mark.full) for name in ("gla", "hgrn"))],
)
def test_long_sequences_follow_from_short_ones(name, tokens, monkeypatch):
    batch = MicroBatch(tokens, 1, torch.float32, "auto")
    with torch.device("meta"):
        model = LanguageModel(config_of(name), mixers_of(name), VOCAB)

    def traced():
        tracer = PartTracer(model)
        return tracer.mixer(tracer.kind(0), batch), tracer.mlp("mlp", batch), tracer.loss(batch)

    whole = traced()
    monkeypatch.setattr(parts, "MOST", 512)
    for exact, line in zip(whole, traced(), strict=True):
        for one, other in ((exact.forward, line.forward), (exact.backward, line.backward)):
            assert other.kept == pytest.approx(one.kept, rel=0.02)
            assert other.peak == pytest.approx(one.peak, rel=0.1)
            moved = [sum(calls.bytes for calls in each.calls.values()) for each in (one, other)]
            assert moved[1] == pytest.approx(moved[0], rel=0.05)
        assert line.executed_forward == pytest.approx(exact.executed_forward, rel=0.02)


@pytest.mark.all
def test_flops_of_a_kernel_follow_from_short_sequences_beside_any_softmax(monkeypatch):
    batch = MicroBatch(832, 1, torch.float32, "auto")
    mixers = {"intra_hybrid": MIXERS.get("intra_hybrid").Config(full=True)}
    with torch.device("meta"):
        model = LanguageModel(config_of("intra_hybrid"), mixers, VOCAB)
    found, exact = [], []
    # A linear branch, a window of 512 and full attention; the second traces all of it.
    for into, chunk in ((found, 128), (exact, 1024)):
        monkeypatch.setattr(parts, "CHUNKED", chunk)
        tracer = PartTracer(model)
        traced = tracer.mixer(tracer.kind(0), batch)
        into += [traced.executed_forward, traced.executed_backward]
    assert found == pytest.approx(exact, rel=1e-6)


@pytest.mark.all
def test_bfloat16_keeps_less():
    config, mixers = config_of("gla", "attention"), mixers_of("gla", "attention")
    wide, narrow = (count_model(config, mixers, VOCAB, tokens=TOKENS, dtype=d) for d in (torch.float32, torch.bfloat16))
    kept = [counts.saved_bytes(checkpointing=False) for counts in (wide, narrow)]
    assert 0.4 * kept[0] < kept[1] < 0.95 * kept[0]


@pytest.mark.all
def test_a_model_of_billions_is_counted_without_its_memory():
    names = ("gated_delta_net", "attention")
    config = dataclasses.replace(config_of(*names, depth=24), width=4096, heads=32)
    counts = count_model(config, mixers_of(*names), 50257, tokens=512, dtype=torch.bfloat16)
    assert 5e9 < counts.parameters < 7e9
    # 2 FLOPs a parameter and token forward, 4 backward; the embedding is read, but its matrix is the head's.
    assert counts.step_flops == pytest.approx(6 * 512 * counts.parameters, rel=0.05)


def test_encoders_are_counted_as_they_run():
    kept = {}
    for kind in ("decoder", "encoder"):
        for name in ("gla", "attention"):
            counts = count_model(config_of(name, kind=kind), mixers_of(name), VOCAB, tokens=TOKENS)
            [mixer] = [part for part in counts.parts if part.part == "mixer"]
            kept[kind, name] = mixer.executed_forward
    # A recurrence runs in both directions, attention looks at all pairs of tokens.
    assert all(kept["encoder", name] > 1.2 * kept["decoder", name] for name in ("gla", "attention"))
