"""Layers in groups of tokens, and that every tiny preset learns."""

import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.checkpoint import checkpoint

from seqtrain.config import compose_config, conf_dir
from seqtrain.errors import ConfigError
from seqtrain.layers import RMSNorm
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.models import LanguageModel, ModelConfig, feed_forward, generate
from seqtrain.models.block import Block
from seqtrain.models.feed_forward import MLP, SwiGLULinear
from seqtrain.models.lora import AdaptedLinear
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error
from seqtrain.validation import validate
from tests.command_cases import refused
from tests.models import tiny

WIDTH, HEADS, GROUP = 32, 2, 8
# Of each kind of state: a matrix, a vector, past inputs, all keys and positions, a window of keys; several steps per
# token; mini-batches that do not fill a group.
MIXED = {"gla": {}, "s5": {}, "gated_delta_net": {}, "attention": {}, "sliding_attention": {}}
MIXED |= {"delta_product": {}, "ttt_linear": {"mini_batch": 5}}


def block(name, group, shift=0, **fields):
    torch.manual_seed(3)
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(**fields), LayerShape(WIDTH, HEADS, 1, 4))
    return Block(mixer, MLP(WIDTH, 64), partial(RMSNorm, WIDTH), group=group, shift=shift).double()


def x(tokens, batch=2):
    generator = torch.Generator().manual_seed(6)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_groups_are_sequences_of_their_own(name):
    grouped, whole = (block(name, group, **MIXED[name]) for group in (GROUP, 0))
    for tokens in (5, 24, 37):
        expected = torch.cat([whole(part)[0] for part in x(tokens).split(GROUP, 1)], 1)
        assert relative_error(grouped(x(tokens))[0], expected) < 1e-11


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_shifted_groups_begin_before_the_sequence(name):
    shifted, whole = block(name, GROUP, shift=3, **MIXED[name]), block(name, 0, **MIXED[name])
    for tokens in (4, 5, 37):
        parts = [x(tokens)[:, :5], *x(tokens)[:, 5:].split(GROUP, 1)]
        expected = torch.cat([whole(part)[0] for part in parts if part.shape[1]], 1)
        assert relative_error(shifted(x(tokens))[0], expected) < 1e-11
        assert shifted.mixer_flops(tokens) == sum(whole.mixer_flops(part.shape[1]) for part in parts)


@pytest.mark.parametrize(("name", "shift"), [*((name, 0) for name in MIXED), ("gla", 3), ("attention", 3)])
@torch.no_grad()
def test_groups_are_counted_over_pieces_and_steps(name, shift):
    grouped = block(name, GROUP, shift, **MIXED[name])
    whole, final = grouped(x(45))
    out, state = [], None
    for piece in x(45).split([3, 5, 1, 16, 9, 6, 5], 1):
        part, state = grouped(piece, state)
        out.append(part)
    assert relative_error(torch.cat(out, 1), whole) < 1e-11
    assert state.keys() == final.keys()
    out, state = [], None
    for token in x(45).unbind(1):
        part, state = grouped(token, state)
        out.append(part[:, None])
    assert relative_error(torch.cat(out, 1), whole) < 1e-11


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("name", ["gla", "attention"])
@torch.no_grad()
def test_groups_begin_again_with_each_document(name, shift):
    grouped, lengths = block(name, GROUP, shift), [3, 20, 1, 11]
    packed = grouped(x(35, batch=1), sequence=SequenceContext(boundaries(lengths)))[0]
    separate = [grouped(part)[0] for part in x(35, batch=1).split(lengths, 1)]
    assert relative_error(packed, torch.cat(separate, 1)) < 1e-11


def test_groups_within_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 128 tokens within groups of 8"):
        block("tcnca", GROUP)(x(20))


def model(**fields):
    fields = {"depth": 4, "width": WIDTH, "initializer_range": 0.3, "layers": ("gla", "attention"), **fields}
    return tiny.build(**fields).double()


def tokens(count=30, rows=2):
    return tiny.batch(count, rows)[0]


@torch.no_grad()
def test_a_model_generates_through_its_groups():
    grouped = model(groups=(GROUP, 0, 5))
    assert [each.group for each in grouped.blocks] == [8, 0, 5, 8]
    new = generate(grouped, tokens(6), max_new_tokens=20, temperature=0)
    logits, _ = grouped(torch.cat([tokens(6), new], 1), all_logits=True)
    assert torch.equal(new, logits[:, 5:-1].argmax(-1))


@torch.no_grad()
def test_a_shift_lets_all_tokens_meet():
    def reaching(**fields):
        """How many tokens change what is made of the last one."""
        layered, given = model(groups=(GROUP,), layers=("gla",), **fields), tokens(32, rows=1)
        last = layered(given)[0]
        changed = [
            given.index_fill(1, torch.tensor(place), int(given[0, place] + 1) % tiny.VOCAB) for place in range(32)
        ]
        return sum(not torch.equal(layered(other)[0], last) for other in changed)

    assert reaching() == 8
    assert reaching(group_shift=(0, 4), depth=7) == 32


def test_a_shift_of_a_whole_group_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.group_shift=\[0, 8\]: layer 1 has groups of 8 tokens"):
        model(groups=(GROUP,), group_shift=(0, 8))
    with pytest.raises(ConfigError, match=r"^model\.group_shift=\[1\]: layer 0 has groups of 0 tokens"):
        model(group_shift=(1,))


@torch.no_grad()
def test_groups_are_counted_in_flops_and_bytes():
    grouped, whole = model(groups=(GROUP,)), model()
    assert grouped.parameter_count() == whole.parameter_count()
    for each, plain in zip(grouped.blocks, whole.blocks, strict=True):
        assert each.mixer_flops(20) == 2 * plain.mixer.flops(8) + plain.mixer.flops(4)
        assert each.mlp_flops(20) == plain.mlp_flops(20) == 6 * 20 * WIDTH * grouped.config.hidden
    _, state = model(groups=(GROUP,)).float()(tokens(12, rows=1))
    assert grouped.state_bytes(12) == sum(value.nbytes for layer in state for value in layer.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": []}, "model.groups"),
        ({"groups": [-1]}, "model.groups.0=-1"),
        ({"spike_rate": -1.0}, "model.spike_rate"),
    ],
)
def test_wrong_keys_are_named(fields, message):
    values = {"layers": ["gla"], "depth": 1, "width": 32, "heads": 2, **fields}
    with refused(message):
        validate(ModelConfig, values, prefix="model.")


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "model").glob("*_tiny.yaml")))
def test_a_tiny_preset_learns_from_one_step(name):
    torch.manual_seed(0)
    composed = OmegaConf.to_container(compose_config(f"model/{name}"))
    config, fields = validate(ModelConfig, composed["model"]), composed.get("mixer", {})
    mixers = {layer: MIXERS.get(layer).Config(**fields.get(layer, {})) for layer in config.layers}
    network = LanguageModel(config, mixers, tiny.VOCAB)
    ids = tokens(33)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    before = network(ids[:, :-1], ids[:, 1:])
    before.backward()
    assert [key for key, parameter in network.named_parameters() if not parameter.grad.any()] == []
    optimizer.step()
    assert network(ids[:, :-1], ids[:, 1:]).item() < before.item()


def test_deltanet_s_two_global_layers_are_the_second_and_the_one_after_the_middle():
    """arXiv 2406.06484, section 3.4: layers 2 and N/2 + 1, counted from one."""
    for name, depth in (("delta_net_global_125m", 12), ("delta_net_global_tiny", 4)):
        config = compose_config(f"model/{name}").model
        assert config.depth == len(config.layers) == depth
        found = [place for place, layer in enumerate(config.layers, 1) if layer == "attention"]
        assert found == [2, depth // 2 + 1]


@torch.no_grad()
def test_swiglu_in_the_epilogue_is_swiglu():
    epilogue, plain = model(mlp_epilogue=True), model()
    assert {type(each.mlp.up) for each in epilogue.blocks} == {SwiGLULinear}
    assert epilogue.state_dict().keys() == plain.state_dict().keys()
    assert relative_error(epilogue(tokens())[0], plain(tokens())[0]) < 1e-12
    with pytest.raises(ConfigError, match=r"^model\.mlp_epilogue=true: is there for SwiGLU without biases"):
        model(mlp_epilogue=True, activation="gelu")
    with pytest.raises(ConfigError, match=r"^model\.mlp_epilogue=true: leaves adapters no place"):
        AdaptedLinear(epilogue.blocks[0].mlp.up)


@pytest.mark.parametrize("around", ["nothing", "hooks", "checkpoint"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_enters_an_mlp_s_last_matrix_is_not_kept_but_made_again(activation, around, monkeypatch):
    made = []
    inner = feed_forward.activated

    def activated(*arguments, **options):
        made.append(inner(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(feed_forward, "activated", activated)
    mlp, x = MLP(16, 24, activation=activation), torch.randn(2, 9, 16, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: (saved,), lambda saved: saved[0])
    with hooks if around == "hooks" else nullcontext():
        out = checkpoint(mlp, x, use_reentrant=False) if around == "checkpoint" else mlp(x)
    kept = weakref.ref(made.pop().untyped_storage())
    assert kept() is None
    leaves = [x, *mlp.parameters()]
    found = torch.autograd.grad(out.sin().sum(), leaves)
    assert made
    gate, value = (x @ mlp.up.weight.T).chunk(2, -1)
    expected = (getattr(torch.nn.functional, activation)(gate) * value) @ mlp.out.weight.T
    exact = torch.autograd.grad(expected.sin().sum(), leaves)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, exact, strict=True))
